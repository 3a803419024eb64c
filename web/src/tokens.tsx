// Every token of an episode, coloured by its author or by a number; those in the loss are underlined.

import { useState } from "preact/hooks";
import type { Tokens } from "./data";
import { number, Visible } from "./text";

const COLORS: [string, string][] = [
  ["author", "author"],
  ["logprob", "log-probability"],
  ["entropy", "entropy"],
  ["advantage", "advantage"],
  ["ratio", "importance ratio"],
  ["value", "value"],
];
type Column = "logprob" | "entropy" | "advantage" | "ratio" | "value";
const MOST = 4000;

export function TokenView({ tokens, color, choose }: { tokens: Tokens; color: string; choose: (color: string) => void }) {
  const [at, select] = useState(-1);
  const [whole, open] = useState(false);
  const column = color === "author" ? null : tokens[color as Column];
  const scale = column ? scaleOf(color, column) : () => undefined;
  const count = whole ? tokens.id.length : Math.min(MOST, tokens.id.length);
  const move = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.id.length, End: tokens.id.length }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(count - 1, at + step));
    select(next);
    (event.currentTarget as HTMLElement).querySelector(`[data-at="${next}"]`)?.scrollIntoView({ block: "nearest" });
  };
  return (
    <section aria-label="Tokens">
      <div class="bar">
        <h3>Tokens</h3>
        <label>
          Colour by{" "}
          <select name="color" value={color} onChange={(event) => choose(event.currentTarget.value)}>
            {COLORS.map(([name, label]) => (
              <option key={name} value={name}>
                {label}
              </option>
            ))}
          </select>
        </label>
        <span class="legend">
          {column ? (
            <Legend color={color} column={column} />
          ) : (
            <>
              <span class="key action" /> agent <span class="key observation" /> environment <span class="key context" /> rewritten history
            </>
          )}{" "}
          <span class="trained">underlined</span>: the agent's own, all that the loss sees
        </span>
      </div>
      <p class="token-at" role="status">
        {at < 0 ? (
          <span class="soft">Point at a token, or move through them with the arrow keys.</span>
        ) : (
          <>
            <b>
              <Visible text={JSON.stringify(tokens.text[at] ?? null)} />
            </b>{" "}
            id {tokens.id[at]} · {tokens.kind[at]}
            {tokens.step[at]! >= 0 ? `, turn ${tokens.step[at]! + 1}` : ", prompt"} · log-probability {number(tokens.logprob[at])} · entropy{" "}
            {number(tokens.entropy[at])} · advantage {number(tokens.advantage[at])} · ratio {number(tokens.ratio[at], 4)} · value{" "}
            {number(tokens.value[at])}
          </>
        )}
      </p>
      <div
        class="tokens"
        tabIndex={0}
        data-arrows
        role="group"
        aria-label="Tokens of the episode"
        onKeyDown={move}
        onMouseOver={(event) => {
          const place = (event.target as HTMLElement).closest<HTMLElement>("[data-at]")?.dataset.at;
          if (place !== undefined) select(Number(place));
        }}
      >
        {tokens.id.slice(0, count).map((id, index) => (
          <Token
            key={index}
            index={index}
            text={tokens.text[index] ?? `[${id}]`}
            kind={column ? "plain" : tokens.kind[index]!}
            trained={tokens.trained[index]!}
            selected={index === at}
            heat={column ? scale(column[index] ?? null) : undefined}
          />
        ))}
      </div>
      {count < tokens.id.length && (
        <button class="more" onClick={() => open(true)}>
          show all {number(tokens.id.length)} tokens
        </button>
      )}
    </section>
  );
}

interface Shown {
  index: number;
  text: string;
  kind: string;
  trained: boolean;
  selected: boolean;
  heat: string | undefined;
}

function Token({ index, text, kind, trained, selected, heat }: Shown) {
  if (text === "") text = "⋯"; // a part of a character
  const name = `token ${kind}${trained ? " trained" : ""}${selected ? " selected" : ""}`;
  const [before, after] = text.split(/\n(?=[^]*$)/, 2).length > 1 ? [text.replaceAll("\n", "↵"), text.replace(/[^\n]/g, "")] : [text, ""];
  return (
    <>
      <span class={name} data-at={index} style={heat ? { backgroundColor: heat } : undefined}>
        <Visible text={before!} />
      </span>
      {after}
    </>
  );
}

// Numbers as colours: those with a sign from orange over none to blue, others from none to blue.
function scaleOf(name: string, column: (number | null)[]): (value: number | null) => string | undefined {
  const [zero, size] = rangeOf(name, column);
  return (value) => {
    if (value === null) return undefined;
    const share = Math.max(-1, Math.min(1, (value - zero) / size));
    const hue = share < 0 ? "var(--heat-low)" : "var(--heat-high)";
    return `color-mix(in srgb, ${hue} ${Math.round(Math.abs(share) * 80)}%, transparent)`;
  };
}

function rangeOf(name: string, column: (number | null)[]): [number, number] {
  const zero = name === "ratio" ? 1 : 0;
  const known = column.filter((value) => value !== null).map((value) => Math.abs(value - zero));
  return [zero, Math.max(1e-9, ...known.slice(0, 50000))];
}

function Legend({ color, column }: { color: string; column: (number | null)[] }) {
  const [zero, size] = rangeOf(color, column);
  if (!column.some((value) => value !== null)) return <>no token has one</>;
  const low = column.some((value) => value !== null && value < zero);
  const high = column.some((value) => value !== null && value > zero);
  return (
    <>
      {low && (
        <>
          {number(zero - size)} <span class="ramp low" />{" "}
        </>
      )}
      {number(zero)}
      {high && (
        <>
          {" "}
          <span class="ramp high" /> {number(zero + size)}
        </>
      )}
    </>
  );
}
