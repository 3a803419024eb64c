// The charts of one run or of several, with smoothing, by iteration or by time.

import { Chart, linesOf, panels } from "./chart";
import type { Curves as Figures } from "./data";
import { change, type Route } from "./route";

export function Curves({ runs, route }: { runs: [string, Figures][]; route: Route }) {
  const time = route.query.get("by") === "time";
  const weight = Number(route.query.get("smooth") ?? 0);
  const found = panels(runs.map(([, curves]) => curves));
  return (
    <section aria-label="Curves">
      <div class="bar">
        <label>
          By{" "}
          <select value={time ? "time" : "iteration"} onChange={(event) => change(route, { by: event.currentTarget.value }, true)}>
            <option value="iteration">iteration</option>
            <option value="time">training time</option>
          </select>
        </label>
        <label>
          Smoothing{" "}
          <input
            type="range"
            min="0"
            max="0.95"
            step="0.05"
            value={weight}
            onInput={(event) => change(route, { smooth: event.currentTarget.value === "0" ? "" : event.currentTarget.value }, true)}
          />{" "}
          <output>{weight || "none"}</output>
        </label>
      </div>
      <div class="charts">
        {found.map(([title, names]) => (
          <Chart key={title} title={title} lines={linesOf(names, runs, time)} weight={weight} time={time} />
        ))}
      </div>
      {!found.length && <p class="soft">No iteration is done yet.</p>}
    </section>
  );
}

// A curve in a line of text.
export function Curve({ values }: { values: number[] }) {
  if (values.length < 2) return <span class="soft">–</span>;
  const low = Math.min(...values);
  const size = Math.max(...values) - low || 1;
  const points = values.map((y, i) => `${((i / (values.length - 1)) * 98 + 1).toFixed(1)},${(21 - ((y - low) / size) * 18).toFixed(1)}`);
  return (
    <svg class="spark" viewBox="0 0 100 24" role="img" aria-label={`from ${values[0]!.toFixed(2)} to ${values.at(-1)!.toFixed(2)}`}>
      <polyline points={points.join(" ")} />
    </svg>
  );
}
