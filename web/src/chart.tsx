// Curves, by uPlot.

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Curves } from "./data";
import { number } from "./text";

export interface Line {
  label: string;
  color: number;
  dash: number;
  x: number[];
  y: (number | null)[];
}

export const NUM_COLORS = 8;
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];

// Exponential moving average, without the bias to its first value; gaps stay gaps.
export function smooth(values: (number | null)[], weight: number): (number | null)[] {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

export function Chart({ title, lines, weight, time }: { title: string; lines: Line[]; weight: number; time: boolean }) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const theme = useRef("");
  const shape = JSON.stringify([title, time, lines.map((line) => [line.label, line.color, line.dash])]);
  const table = () =>
    uPlot.join(lines.map((line) => [line.x, weight ? smooth(line.y, weight) : line.y] as uPlot.AlignedData));

  useEffect(() => {
    const box = place.current!;
    const draw = () => {
      plot.current?.destroy();
      theme.current = themeNow();
      plot.current = new uPlot(options(box, lines, time), table(), box);
    };
    draw();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: box.clientWidth, height: 220 }));
    resized.observe(box);
    const repaint = () => theme.current !== themeNow() && draw();
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", repaint);
    const themed = new MutationObserver(repaint);
    themed.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    return () => {
      resized.disconnect();
      themed.disconnect();
      media.removeEventListener("change", repaint);
      plot.current?.destroy();
    };
  }, [shape]);
  useEffect(() => plot.current?.setData(table()), [shape, weight, lines]);

  const last = lines.map((line) => `${line.label} ${number(line.y.findLast((value) => value !== null))}`);
  return (
    <figure class="chart" aria-label={`${title}; last: ${last.join(", ")}`}>
      <figcaption>{title}</figcaption>
      <div ref={place} />
    </figure>
  );
}

const WHOLE = [1, 2, 5].flatMap((first) => [0, 1, 2, 3, 4, 5].map((zeros) => first * 10 ** zeros)).sort((a, b) => a - b);

/** The range of a chart: a little more than its values, also where they are all alike. */
function around(_: uPlot, low: number | null, high: number | null): uPlot.Range.MinMax {
  if (low === null || high === null) return [null, null];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  return uPlot.rangeNum(low, high, 0.1, true);
}

function options(box: HTMLElement, lines: Line[], time: boolean): uPlot.Options {
  const probe = box.appendChild(document.createElement("i"));
  const color = (name: string) => {
    probe.style.color = `var(${name})`; // what light-dark() comes to
    return getComputedStyle(probe).color;
  };
  const axis: uPlot.Axis = {
    stroke: color("--soft"),
    grid: { stroke: color("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui",
  };
  const found: uPlot.Options = {
    width: box.clientWidth,
    height: 220,
    cursor: { sync: { key: time ? "seconds" : "iterations" }, y: false },
    legend: { live: true },
    scales: { x: { time: false }, y: { range: around } },
    axes: [
      { ...axis, size: 28, ...(time ? {} : { incrs: WHOLE }), values: (_, ticks) => ticks.map((tick) => (time ? clock(tick) : number(tick))) },
      { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => number(tick)) },
    ],
    series: [
      { label: time ? "time" : "iteration", value: (_, x) => (x === null ? "last" : time ? clock(x) : number(x)) },
      ...lines.map((line) => ({
        label: line.label,
        stroke: color(`--color-${line.color % NUM_COLORS}`),
        dash: DASHES[line.dash % DASHES.length],
        width: 1.75,
        spanGaps: true,
        points: { show: line.y.filter((value) => value !== null).length < 40, size: 4 },
        value: (plot: uPlot, y: number | null, place: number, at: number | null) =>
          number(at === null ? [...(plot.data[place] ?? [])].findLast((value) => value != null) : y),
      })),
    ],
  };
  probe.remove();
  return found;
}

function themeNow(): string {
  return `${document.documentElement.dataset.theme} ${matchMedia("(prefers-color-scheme: dark)").matches}`;
}

function clock(seconds: number): string {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${+(seconds / 60).toFixed(1)} min` : `${+(seconds / 3600).toFixed(2)} h`;
}

// Which figures stand together; a name that ends in "/" means all that begin so.
export const PANELS: [string, string[]][] = [
  ["Success", ["success", "validation/success"]],
  ["Reward", ["reward", "shaped"]],
  ["Process rewards an episode, by part", ["process/"]],
  ["Validation by category: success", ["validation/"]],
  ["Entropy, nats a token", ["entropy"]],
  ["KL to the reference, nats a token", ["kl"]],
  ["Loss", ["loss", "value_loss"]],
  ["Gradient norm", ["grad_norm"]],
  ["Clipped tokens, share", ["clip_fraction"]],
  ["Engine against learner, nats a token", ["logprob_error"]],
  ["Tokens an episode", ["action_tokens", "tokens"]],
  ["Turns and calls an episode", ["turns", "tool_calls"]],
  ["Episodes that a limit or a fault ended", ["stop/"]],
  ["Faults of tools", ["fault/"]],
  ["Mistakes of the agent", ["mistake/"]],
  ["Noise that was injected", ["noise/"]],
  ["Groups", ["groups_used", "groups_without_signal"]],
  ["Tokens a second", ["tokens_per_second/"]],
  ["Seconds an iteration, by part", ["seconds/"]],
  ["Seconds that steps wait for their environment", ["env_seconds/"]],
  ["Memory, GiB", ["memory_gib/"]],
  ["Learning rate", ["lr"]],
];

const ELSEWHERE = /^(stop\/done|engine\/|updates|resampled|iterations_without_signal)/;

// The panels that have figures, and at last each figure that has no panel.
export function panels(all: Curves[]): [string, string[]][] {
  const names = [...new Set(all.flatMap((curves) => Object.keys(curves.figures)))].sort();
  const rest = new Set(names);
  const found: [string, string[]][] = [];
  for (const [title, wanted] of PANELS) {
    const here = names.filter(
      (name) =>
        rest.has(name) &&
        !ELSEWHERE.test(name) &&
        wanted.some((word) =>
          word === "validation/" ? /^validation\/.+\/success$/.test(name) : word.endsWith("/") ? name.startsWith(word) : name === word,
        ),
    );
    here.forEach((name) => rest.delete(name));
    if (here.length && all.length > 1 && here.length > 2) here.forEach((name) => found.push([`${title}: ${name}`, [name]]));
    else if (here.length) found.push([title, here]);
  }
  return [...found, ...[...rest].map((name): [string, string[]] => [name, [name]])];
}

export function linesOf(names: string[], runs: [string, Curves][], time: boolean): Line[] {
  const lines: Line[] = [];
  runs.forEach(([run, curves], place) =>
    names.forEach((name, index) => {
      const y = curves.figures[name];
      if (!y) return;
      const label = runs.length === 1 ? name : names.length === 1 ? run : `${run} · ${name}`;
      const single = runs.length === 1;
      lines.push({
        label,
        color: single ? index : place,
        dash: single ? 0 : index,
        x: time ? curves.seconds : curves.iteration,
        y,
      });
    }),
  );
  return lines;
}
