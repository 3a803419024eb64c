// The episodes of a run: filtered, sorted, a page at a time.

import { type Episodes, path, type Run, useData } from "./data";
import { Problem } from "./main";
import { change, href, type Route } from "./route";
import { number, plain, Visible } from "./text";

const PAGE = 100;
const OWN = ["sort", "order", "offset", "limit"];

export function EpisodesPage({ run, route }: { run: Run; route: Route }) {
  const { query } = route;
  const asked = new URLSearchParams(query);
  asked.set("limit", String(PAGE));
  const { data, error } = useData<Episodes>(`${path("episodes", run.name)}?${asked}`, (found) =>
    found?.unread ? 1000 : run.state === "running" ? 3000 : 0,
  );
  const { facets } = run;
  const parts = Object.keys(facets.parts).sort();
  const offset = Number(query.get("offset") ?? 0);
  const set = (name: string, value: string) => change(route, { [name]: value, offset: "" }, true);
  const named = new Set(["iteration", "task", "success", "stop", "event", "category", "text", "turns", ...OWN]);
  const more = [...query].filter(([name]) => !named.has(name) && !parts.some((part) => name === `part/${part}`));
  return (
    <>
      <form class="filters" onSubmit={(event) => event.preventDefault()} aria-label="Filters">
        <Field label="Text" name="text" hint="words, or their beginnings" {...{ query, set }} wide />
        <Field
          label="Iteration"
          name="iteration"
          hint={facets.iterations.length ? `${facets.iterations.join("..")}` : "3..5"}
          {...{ query, set }}
        />
        <Choice label="Outcome" name="success" options={[["1", "solved"], ["0", "not solved"]]} {...{ query, set }} />
        <Choice label="Stopped by" name="stop" options={counted(facets.stops)} {...{ query, set }} />
        <Choice label="Event" name="event" options={counted(facets.events)} {...{ query, set }} />
        {Object.keys(facets.categories).length > 1 && (
          <Choice label="Category" name="category" options={counted(facets.categories)} {...{ query, set }} />
        )}
        {parts.map((part) => (
          <Field key={part} label={`Reward ${part}`} name={`part/${part}`} hint="..0.5" {...{ query, set }} />
        ))}
        <Field label="Turns" name="turns" hint="3..8" {...{ query, set }} />
        <Field label="Task" name="task" hint="its whole name" {...{ query, set }} />
        <Choice
          label="Sort by"
          name="sort"
          none="newest first"
          options={[...Object.entries(run.numbers).map(([name]): [string, string] => [name, name.replaceAll("_", " ")]), ...parts.map((part): [string, string] => [`part/${part}`, `reward ${part}`])]}
          {...{ query, set }}
        />
        <Choice label="Order" name="order" options={[["ascending", "ascending"]]} none="descending" {...{ query, set }} />
        {more.map(([name, value]) => (
          <button key={name} type="button" aria-label={`no filter by ${name}`} onClick={() => set(name, "")}>
            {name} = {value} ✕
          </button>
        ))}
        <button type="button" onClick={() => (location.hash = href(route.parts))}>
          clear
        </button>
      </form>
      {error && <Problem>{error}</Problem>}
      {data && (
        <>
          <p class="soft" role="status">
            {data.total.toLocaleString("en")} of {facets.episodes.toLocaleString("en")} episodes
            {data.unread > 0 && ` · ${data.unread} more iterations are being read`}
          </p>
          <div class="scroll">
            <table class="episodes">
              <thead>
                <tr>
                  <Sorted label="episode" name="iteration" route={route} />
                  <th scope="col">task</th>
                  <th scope="col">stop</th>
                  <Sorted label="reward" name="reward" route={route} num />
                  {parts.map((part) => (
                    <Sorted key={part} label={part} name={`part/${part}`} route={route} num />
                  ))}
                  <Sorted label="turns" name="turns" route={route} num />
                  <Sorted label="calls" name="tool_calls" route={route} num />
                  <Sorted label="tokens" name="action_tokens" route={route} num />
                  <Sorted label="advantage" name="advantage" route={route} num />
                  <th scope="col">events</th>
                  <th scope="col">last said</th>
                </tr>
              </thead>
              <tbody>
                {data.rows.map((row) => (
                  <tr key={`${row.iteration}/${row.group}/${row.attempt}`}>
                    <th scope="row">
                      <a href={href(["run", run.name, "episode", row.iteration, row.group, row.attempt])}>
                        {row.iteration}/{row.group}/{row.attempt}
                      </a>
                    </th>
                    <td class="words" title={plain(row.question)}>
                      <a class="quiet" href={href(["run", run.name, "group", row.iteration, row.group])}>
                        <Visible text={row.question || row.task} />
                      </a>
                    </td>
                    <td>
                      <span class={row.success ? "good" : row.success === null ? "bad" : ""}>{row.success ? "✓ " : ""}{row.stop}</span>
                    </td>
                    <td class="num">{number(row.reward)}</td>
                    {parts.map((part) => (
                      <td key={part} class="num">
                        {number(row.parts[part])}
                      </td>
                    ))}
                    <td class="num">{row.turns}</td>
                    <td class="num">{row.tool_calls}</td>
                    <td class="num">{number(row.action_tokens)}</td>
                    <td class="num">{number(row.advantage)}</td>
                    <td class="events-cell">
                      {Object.entries(row.events).map(([name, count]) => (
                        <span key={name} class={`event ${name.split("/")[0]}`}>
                          <Visible text={name} />
                          {count > 1 ? ` ×${count}` : ""}
                        </span>
                      ))}
                    </td>
                    <td class="words">
                      <Visible text={row.fault ?? row.answer} />
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
          <div class="bar">
            <button disabled={!offset} onClick={() => change(route, { offset: offset > PAGE ? String(offset - PAGE) : "" })}>
              previous
            </button>
            <span>
              {data.total ? offset + 1 : 0} to {Math.min(offset + PAGE, data.total)}
            </span>
            <button disabled={offset + PAGE >= data.total} onClick={() => change(route, { offset: String(offset + PAGE) })}>
              next
            </button>
          </div>
        </>
      )}
    </>
  );
}

interface Control {
  label: string;
  name: string;
  query: URLSearchParams;
  set: (name: string, value: string) => void;
}

function Field({ label, name, hint, query, set, wide }: Control & { hint: string; wide?: boolean }) {
  return (
    <label class={wide ? "wide" : ""}>
      {plain(label)}
      <input name={name} placeholder={hint} value={query.get(name) ?? ""} onChange={(event) => set(name, event.currentTarget.value.trim())} />
    </label>
  );
}

function Choice({ label, name, options, none, query, set }: Control & { options: [string, string][]; none?: string }) {
  const value = query.get(name) ?? "";
  const known = options.some(([option]) => option === value);
  return (
    <label>
      {label}
      <select name={name} value={value} onChange={(event) => set(name, event.currentTarget.value)}>
        <option value="">{none ?? "any"}</option>
        {value && !known && <option value={value}>{plain(value)}</option>}
        {options.map(([option, text]) => (
          <option key={option} value={option}>
            {plain(text)}
          </option>
        ))}
      </select>
    </label>
  );
}

function Sorted({ label, name, route, num }: { label: string; name: string; route: Route; num?: boolean }) {
  const current = (route.query.get("sort") ?? "iteration") === name;
  const up = route.query.get("order") === "ascending";
  const turn = () => change(route, { sort: name, order: current && !up ? "ascending" : "", offset: "" }, true);
  return (
    <th scope="col" class={num ? "num" : ""} aria-sort={current ? (up ? "ascending" : "descending") : undefined}>
      <button class="sort" onClick={turn}>
        {plain(label)}
        {current ? (up ? " ↑" : " ↓") : ""}
      </button>
    </th>
  );
}

const counted = (found: Record<string, number>): [string, string][] =>
  Object.entries(found).map(([name, count]) => [name, `${name || "none"} (${count.toLocaleString("en")})`]);
