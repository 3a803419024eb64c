// The window: its head, and the page that the address names.

import { type ComponentChildren, render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { DiagnosisPage } from "./diagnosis";
import { path, type Run, useData } from "./data";
import { EpisodePage } from "./episode";
import { EpisodesPage } from "./episodes";
import { GroupPage } from "./group";
import { href, type Route, useRoute } from "./route";
import { RunPage, StateBadge } from "./run";
import { RunsPage } from "./runs";
import { duration, plain, Visible } from "./text";
import "./style.css";

const THEMES = ["auto", "light", "dark"];

function App() {
  const route = useRoute();
  const [first, name, page, ...place] = route.parts;
  useEffect(() => {
    document.title = plain([name, page, place.join("/"), "Agent-R1"].filter(Boolean).join(" · "));
    scrollTo(0, 0);
  }, [route.parts.join("/")]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")?.focus())}>
        Skip to the content
      </a>
      <header class="top">
        <a class="brand" href="#/">
          Agent-R1
        </a>
        <Theme />
      </header>
      <main id="main" tabIndex={-1}>
        {first === "run" && name ? <OneRun key={name} name={name} page={page} place={place} route={route} /> : <RunsPage route={route} />}
      </main>
    </>
  );
}

function OneRun({ name, page, place, route }: { name: string; page?: string; place: string[]; route: Route }) {
  const live = (run: Run | undefined) => (run?.unread ? 700 : run?.state === "running" ? 2000 : 15000);
  const { data: run, error } = useData<Run>(path("run", name), live);
  const numbers = place.map(Number);
  const tab = (label: string, target?: string) => (
    <a href={href(target ? ["run", name, target] : ["run", name])} aria-current={target === page ? "page" : undefined}>
      {label}
    </a>
  );
  return (
    <>
      <div class="run-head">
        <h1>
          <Visible text={name} />
        </h1>
        {run && <StateBadge run={run} />}
        {run && (
          <span class="soft">
            iteration {run.iteration}
            {run.iterations ? ` of ${run.iterations}` : ""}
            {run.seconds_left !== null ? ` · ${duration(run.seconds_left)} left` : ""}
          </span>
        )}
        <nav aria-label="Pages of the run">
          {tab("Overview")}
          {tab("Episodes", "episodes")}
          {tab("Diagnosis", "diagnosis")}
        </nav>
      </div>
      {error && <Problem>{error}</Problem>}
      {run?.problem && <Problem>{run.problem}</Problem>}
      {run &&
        Object.entries(run.damaged).map(([iteration, why]) => (
          <Problem key={iteration}>
            Episodes of iteration {iteration}: {why}
          </Problem>
        ))}
      {run && page === "episodes" && <EpisodesPage run={run} route={route} />}
      {run && page === "diagnosis" && <DiagnosisPage run={run} />}
      {run && page === "group" && <GroupPage run={run} iteration={numbers[0]!} group={numbers[1]!} />}
      {run && page === "episode" && (
        <EpisodePage run={run} iteration={numbers[0]!} group={numbers[1]!} attempt={numbers[2]!} route={route} />
      )}
      {run && !page && <RunPage run={run} route={route} />}
      {!run && !error && <p class="soft">Reading …</p>}
    </>
  );
}

export function Problem({ children }: { children: ComponentChildren }) {
  return (
    <p class="problem" role="alert">
      {children}
    </p>
  );
}

function Theme() {
  const [theme, set] = useState(() => localStorage.getItem("theme") ?? "auto");
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("theme", theme);
  }, [theme]);
  return (
    <label class="theme">
      Colours{" "}
      <select value={theme} onChange={(event) => set(event.currentTarget.value)}>
        {THEMES.map((name) => (
          <option key={name}>{name}</option>
        ))}
      </select>
    </label>
  );
}

const place = document.getElementById("app")!;
place.replaceChildren();
render(<App />, place);
