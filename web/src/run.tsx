// One run: its curves, its test before and after, its recipe.

import { Curves } from "./curves";
import { type Curves as Figures, path, type Run, type Summary, useData } from "./data";
import type { Route } from "./route";
import { number, shown, Visible } from "./text";

const WORDS = {
  running: "running now",
  finished: "all iterations are done",
  stopped: "not running, and not done: --resume goes on with it",
  empty: "nothing was trained yet",
  broken: "its files cannot be read",
};

export function StateBadge({ run }: { run: Summary }) {
  return (
    <span class={`state ${run.state}`} title={run.problem || WORDS[run.state]}>
      {run.state}
    </span>
  );
}

export function RunPage({ run, route }: { run: Run; route: Route }) {
  const { data } = useData<Figures>(path("curves", run.name), run.state === "running" ? 2000 : 15000);
  return (
    <>
      {run.result && <Tested result={run.result} />}
      {data && <Curves runs={[[run.name, data]]} route={route} />}
      <details class="recipe">
        <summary>Recipe</summary>
        <table>
          <tbody>
            {Object.entries(run.recipe).map(([key, value]) => (
              <tr key={key}>
                <th scope="row">{key}</th>
                <td>
                  <Visible text={shown(value)} />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </details>
    </>
  );
}

function Tested({ result }: { result: NonNullable<Run["result"]> }) {
  return (
    <section aria-label="Test">
      <h2>Success on {number(result.tasks)} tasks of each kind that training never saw</h2>
      <div class="scroll">
      <table class="small">
        <thead>
          <tr>
            <th scope="col">category</th>
            <th scope="col" class="num">
              before, sampled
            </th>
            <th scope="col" class="num">
              after, sampled
            </th>
            <th scope="col" class="num">
              before, greedy
            </th>
            <th scope="col" class="num">
              after, greedy
            </th>
          </tr>
        </thead>
        <tbody>
          {Object.keys(result.before ?? {}).map((category) => (
            <tr key={category}>
              <th scope="row">{category || "all"}</th>
              {[result.before, result.after, result.greedy?.before, result.greedy?.after].map((table, place) => (
                <td key={place} class="num">
                  {number(table?.[category])}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      </div>
    </section>
  );
}
