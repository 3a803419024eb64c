// All runs: how they stand, in what they differ, and the curves of those that are chosen.

import { useState } from "preact/hooks";
import { Curve, Curves } from "./curves";
import { path, type Runs, useAll, useData, type Curves as Figures } from "./data";
import { Problem } from "./main";
import { change, href, type Route } from "./route";
import { StateBadge } from "./run";
import { duration, number, shown, Visible } from "./text";

const KEYS = 6;

export function RunsPage({ route }: { route: Route }) {
  const { data, error } = useData<Runs>("/api/runs", 3000);
  const [filter, setFilter] = useState("");
  const chosen = route.query.getAll("with");
  const wanted = filter.toLowerCase();
  const runs = (data?.runs ?? []).filter((run) => `${run.name} ${run.env} ${run.algorithm}`.toLowerCase().includes(wanted));
  const keys = Object.keys(data?.differences ?? {});
  const [all, setAll] = useState(false);
  const told = all ? keys : keys.slice(0, KEYS);
  const curves = useAll<Figures>(chosen.map((name) => path("curves", name)), chosen.length ? 5000 : 0);
  const found = chosen.flatMap((name, place): [string, Figures][] => (curves[place] ? [[name, curves[place]]] : []));

  const choose = (name: string, add: boolean) => {
    const query = new URLSearchParams(route.query);
    query.delete("with");
    const names = add ? [...chosen, name] : chosen.filter((other) => other !== name);
    names.forEach((other) => query.append("with", other));
    location.hash = href(route.parts, query);
  };

  return (
    <>
      <h1>Runs</h1>
      {error && <Problem>{error}</Problem>}
      {data && !data.runs.length && (
        <p>
          No runs in {data.folders.join(", ")} yet. <code>agent-r1 train hopworld</code> makes one; this page shows it as it goes.
        </p>
      )}
      {data && data.runs.length > 0 && (
        <>
          <div class="bar">
            <label>
              Find <input type="search" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
            </label>
            {keys.length > KEYS && (
              <button onClick={() => setAll(!all)}>{all ? "fewer keys" : `all ${keys.length} keys that differ`}</button>
            )}
            {chosen.length > 0 && <button onClick={() => change(route, { with: "" })}>compare none</button>}
          </div>
          <div class="scroll">
            <table>
              <thead>
                <tr>
                  <th scope="col">Compare</th>
                  <th scope="col">Run</th>
                  <th scope="col">State</th>
                  <th scope="col">Success</th>
                  <th scope="col" class="num" title="success in the last iteration's episodes">
                    last
                  </th>
                  <th scope="col" class="num" title="best success on validation tasks">
                    best val.
                  </th>
                  <th scope="col" class="num">
                    iterations
                  </th>
                  <th scope="col" class="num">
                    time
                  </th>
                  {told.map((key) => (
                    <th scope="col" key={key} class="key">
                      {key}
                    </th>
                  ))}
                </tr>
              </thead>
              <tbody>
                {runs.map((run) => (
                  <tr key={run.name}>
                    <td>
                      <input
                        type="checkbox"
                        aria-label={`compare ${run.name}`}
                        checked={chosen.includes(run.name)}
                        onChange={(event) => choose(run.name, event.currentTarget.checked)}
                      />
                    </td>
                    <th scope="row">
                      <a href={href(["run", run.name])}>
                        <Visible text={run.name} />
                      </a>
                    </th>
                    <td>
                      <StateBadge run={run} />
                    </td>
                    <td>
                      <Curve values={run.spark} />
                    </td>
                    <td class="num">{number(run.success)}</td>
                    <td class="num">{number(run.best)}</td>
                    <td class="num">
                      {run.iteration}
                      {run.iterations ? `/${run.iterations}` : ""}
                    </td>
                    <td class="num">
                      {run.seconds_left !== null ? `${duration(run.seconds_left)} left` : duration(run.seconds)}
                    </td>
                    {told.map((key) => (
                      <td key={key} class="key">
                        <Visible text={shown(data.differences[key]![run.name]).slice(0, 60)} />
                      </td>
                    ))}
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
          {found.length > 0 ? (
            <Curves runs={found} route={route} />
          ) : (
            <p class="soft">Choose runs to see their curves on one chart.</p>
          )}
        </>
      )}
    </>
  );
}
