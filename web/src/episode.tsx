// One episode: its turns as a conversation, what each call did and what it meant, its rewards, its tokens.

import { useEffect } from "preact/hooks";
import { type Call, type Episode, type Explanation, type Message, path, type Run, type Step, useData } from "./data";
import { Problem } from "./main";
import { change, href, type Route } from "./route";
import { Copy, counted, duration, Long, number, seconds, signed, Visible } from "./text";
import { TokenView } from "./tokens";

// What is stored of an episode does not change: milliseconds.
export const STAYS = 600_000;

interface Place {
  run: Run;
  iteration: number;
  group: number;
  attempt: number;
  route: Route;
}

export function EpisodePage({ run, iteration, group, attempt, route }: Place) {
  const place = [iteration, group, attempt];
  const { data, error } = useData<Episode>(path("episode", run.name, ...place), STAYS);
  const why = useData<Explanation>(data?.outcome && data.steps.length ? path("explanation", run.name, ...place) : null, STAYS);
  const other = (number_: number) => href(["run", run.name, "episode", iteration, group, number_], route.query);
  useEffect(() => {
    const go = (event: KeyboardEvent) => {
      if (event.target instanceof Element && event.target.closest("input, select, textarea, [data-arrows]")) return;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowLeft" && attempt > 1) location.hash = other(attempt - 1);
      if (event.key === "ArrowRight" && data && attempt < data.attempts) location.hash = other(attempt + 1);
    };
    addEventListener("keydown", go);
    return () => removeEventListener("keydown", go);
  });
  if (error) return <Problem>{error}</Problem>;
  if (!data) return <p class="soft">Reading …</p>;
  const explained = why.data;
  return (
    <>
      <div class="bar">
        <h2>
          Episode {place.join("/")} <span class="soft">of {counted(data.attempts, "attempt")}</span>
        </h2>
        {attempt > 1 && <a href={other(attempt - 1)}>← attempt {attempt - 1}</a>}
        {attempt < data.attempts && <a href={other(attempt + 1)}>attempt {attempt + 1} →</a>}
        <a href={href(["run", run.name, "group", iteration, group])}>all attempts side by side</a>
        <Copy label="copy as Markdown" text={() => markdown(data, run.name, place)} />
        <Copy label="copy as JSON" text={() => JSON.stringify({ run: run.name, place, ...data }, null, 1)} />
      </div>
      <section class="facts" aria-label="Outcome">
        <Fact label="outcome">
          {data.outcome ? (
            <span class={data.outcome.success ? "good" : "bad"}>
              {data.outcome.success ? "✓ solved" : "not solved"}, reward {number(data.outcome.reward)}
            </span>
          ) : (
            <span class="bad">excluded</span>
          )}
        </Fact>
        <Fact label="stopped by">{data.stop}</Fact>
        {Object.keys(data.parts).length > 0 && (
          <Fact label="process rewards">
            <Parts parts={data.parts} />
          </Fact>
        )}
        {data.outcome && Object.keys(data.outcome.metrics).length > 0 && (
          <Fact label="metrics">
            <Parts parts={data.outcome.metrics} />
          </Fact>
        )}
        <Fact label="tokens">
          {number(data.action_tokens)} sampled of {number(data.num_tokens)}
        </Fact>
        <Fact label="time">{duration(data.seconds)}</Fact>
        <Fact label="task">
          <Visible text={data.task.id} />
        </Fact>
        {data.task.answer && (
          <Fact label="gold answer">
            <Visible text={data.task.answer.slice(0, 300)} />
          </Fact>
        )}
        {data.discarded > 0 && <Fact label="earlier plays thrown away">{data.discarded}</Fact>}
      </section>
      {data.fault && <Problem><Visible text={data.fault.slice(0, 2000)} /></Problem>}
      <section aria-label="Conversation" class="conversation">
        {data.prompt.map((message, index) => (
          <Turn key={index} message={message} />
        ))}
        {data.steps.map((step, index) => (
          <StepView key={index} step={step} index={index} episode={data} explained={explained} />
        ))}
      </section>
      {why.error && <p class="soft">Not explained: {why.error}</p>}
      {explained && <Explained explained={explained} attempt={attempt} />}
      <TokenView tokens={data.tokens} color={route.query.get("color") ?? "author"} choose={(color) => change(route, { color }, true)} />
    </>
  );
}

function StepView({ step, index, episode, explained }: { step: Step; index: number; episode: Episode; explained?: Explanation }) {
  const told = explained?.steps[index];
  const mine = episode.tokens.advantage.filter((value, token) => episode.tokens.step[token] === index && value !== null) as number[];
  const isTool = (message: Message) => message.role === "tool";
  // What the environment said of a call stands beside it, where there is one message for each call.
  const answers = step.seen.filter(isTool);
  const paired = step.said.calls.length > 0 && answers.length === step.said.calls.length;
  return (
    <div class="step">
      {step.rewritten && <p class="soft">The environment rewrote the history before this turn: the agent saw the context that the tokens below show.</p>}
      <div class="turn assistant">
        <span class="role">
          agent, turn {index + 1}
          {step.said.cut && <b class="bad"> cut off by the token limit</b>}
        </span>
        {step.said.content && <Long text={step.said.content} />}
        {step.said.calls.map((call, place) => (
          <CallView key={place} call={call} meaning={paired ? answers[place] : undefined} />
        ))}
        <p class="numbers">
          {Object.keys(step.rewards).length > 0 && (
            <span>
              rewards <Parts parts={step.rewards} />
            </span>
          )}
          {told && <span>counted {signed(told.counted)}</span>}
          {told && <span>return {signed(told.return)}</span>}
          {mine.length > 0 && <span>advantage {signed(mine.reduce((sum, value) => sum + value, 0) / mine.length)}</span>}
          {step.state && <span>state <Visible text={step.state} /></span>}
          <span>
            waited {seconds(step.generate_seconds)} for the model, {seconds(step.env_seconds)} for the environment
          </span>
        </p>
        <Events events={step.events} />
      </div>
      {(paired ? step.seen.filter((message) => !isTool(message)) : step.seen).map((message, place) => (
        <Turn key={place} message={message} />
      ))}
    </div>
  );
}

function CallView({ call, meaning }: { call: Call; meaning?: Message }) {
  const raw = call.result;
  return (
    <div class="call">
      <div>
        <span class="role">{call.name ? "call" : "malformed call"}</span>
        {call.name ? (
          <>
            <b>
              <Visible text={call.name} />
            </b>
            <dl class="arguments">
              {Object.entries(call.arguments ?? {}).map(([name, value]) => (
                <div key={name}>
                  <dt>
                    <Visible text={name} />
                  </dt>
                  <dd>
                    <Long text={typeof value === "string" ? value : JSON.stringify(value)} most={1000} />
                  </dd>
                </div>
              ))}
            </dl>
          </>
        ) : (
          <>
            <Long text={call.malformed ?? ""} most={1000} />
            {!raw && (
              <p class="bad">
                <Visible text={call.reason ?? ""} />
              </p>
            )}
          </>
        )}
      </div>
      <div>
        <span class="role">what happened</span>
        {raw ? (
          <>
            {raw.error && <b class="bad">{raw.error}: </b>}
            <Long text={raw.text} most={1500} />
          </>
        ) : (
          <span class="soft">not recorded</span>
        )}
      </div>
      {meaning && (
        <div>
          <span class="role">what it means: the agent sees</span>
          {raw && !raw.error && raw.text === meaning.content ? <span class="soft">the same</span> : <Long text={meaning.content} most={1500} />}
        </div>
      )}
    </div>
  );
}

function Turn({ message }: { message: Message }) {
  return (
    <div class={`turn ${message.role}`}>
      <span class="role">{message.role === "tool" ? "what it means: the agent sees" : message.role}</span>
      <Long text={message.content} />
      {message.calls.map((call, index) => (
        <CallView key={index} call={call} />
      ))}
    </div>
  );
}

function Explained({ explained, attempt }: { explained: Explanation; attempt: number }) {
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
  return (
    <section aria-label="Explanation">
      <h3>Why it was learned from as it was</h3>
      <p>
        Returns of the group's attempts:{" "}
        {explained.group_returns.map((value, index) => (
          <span key={index} class={index + 1 === attempt ? "this" : ""}>
            {value === null ? "–" : number(value)}{" "}
          </span>
        ))}
      </p>
      <p class="soft">
        Advantage of each step, credit “{explained.credit}”; in brackets its push on one token: weight in the loss × advantage × 1000.
      </p>
      <div class="scroll">
        <table class="small">
          <thead>
            <tr>
              <th scope="col">algorithm</th>
              {explained.steps.map((_, index) => (
                <th scope="col" class="num" key={index}>
                  step {index + 1}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {explained.algorithms.map((column) => (
              <tr key={column.name}>
                <th scope="row">
                  <Visible text={column.name} />
                </th>
                {column.advantages.map((values, index) => (
                  <td key={index} class="num">
                    {signed(mean(values))}
                    {column.weights.length > 0 && <span class="soft"> ({signed(mean(values) * column.weights[index]! * 1000)})</span>}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {explained.notes.map((note) => (
        <p class="soft" key={note}>
          <Visible text={note} />
        </p>
      ))}
    </section>
  );
}

function Fact({ label, children }: { label: string; children: preact.ComponentChildren }) {
  return (
    <div>
      <span class="role">{label}</span>
      <span>{children}</span>
    </div>
  );
}

export function Parts({ parts }: { parts: Record<string, number> }) {
  return (
    <>
      {Object.entries(parts).map(([name, value]) => (
        <span class="part" key={name}>
          <Visible text={name} /> {number(value)}{" "}
        </span>
      ))}
    </>
  );
}

export function Events({ events }: { events: string[] }) {
  if (!events.length) return null;
  return (
    <p class="events">
      {events.map((name, index) => (
        <span class={`event ${name.split("/")[0]}`} key={index}>
          <Visible text={name} />
        </span>
      ))}
    </p>
  );
}

// A fence longer than any in the text, so that the text cannot end it.
function fenced(text: string): string {
  const longest = (text.match(/`+/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

function markdown(episode: Episode, run: string, place: number[]): string {
  const said = (message: Message) => {
    const calls = message.calls.map((call) =>
      call.name ? `${call.name}(${JSON.stringify(call.arguments)})\n-> ${call.result?.error ?? ""} ${call.result?.text ?? ""}` : `malformed: ${call.malformed}`,
    );
    return fenced([message.content, ...calls].filter(Boolean).join("\n"));
  };
  const outcome = episode.outcome ? `reward ${episode.outcome.reward}, ${episode.outcome.success ? "solved" : "not solved"}` : `excluded: ${episode.fault}`;
  return [
    `## ${run}, episode ${place.join("/")}: ${episode.stop}, ${outcome}`,
    ...episode.prompt.map((message) => `**${message.role}**\n\n${said(message)}`),
    ...episode.steps.flatMap((step, index) => [
      `**agent, turn ${index + 1}** ${Object.entries(step.rewards).map(([name, value]) => `${name} ${value}`).join(", ")}\n\n${said(step.said)}`,
      ...step.seen.map((message) => `**${message.role}**\n\n${said(message)}`),
    ]),
  ].join("\n\n");
}
