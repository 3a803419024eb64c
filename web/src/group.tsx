// All attempts at one task side by side, and their tokens as a tree: what is shared stands once.

import { type Group, type GroupNode, path, type Run, useData } from "./data";
import { Events, Parts, STAYS } from "./episode";
import { Problem } from "./main";
import { href } from "./route";
import { counted, Long, number, signed, Visible } from "./text";

export function GroupPage({ run, iteration, group }: { run: Run; iteration: number; group: number }) {
  const { data, error } = useData<Group>(path("group", run.name, iteration, group), STAYS);
  if (error) return <Problem>{error}</Problem>;
  if (!data) return <p class="soft">Reading …</p>;
  const place = (attempt: number) => href(["run", run.name, "episode", iteration, group, attempt + 1]);
  const prompt = data.attempts.find((attempt) => attempt.prompt.length)?.prompt ?? [];
  return (
    <>
      <h2>
        Iteration {iteration}, group {group}: {counted(data.attempts.length, "attempt")} at one task
      </h2>
      <div class="bar">
        {group > 1 && <a href={href(["run", run.name, "group", iteration, group - 1])}>previous group</a>}
        {!data.is_last && <a href={href(["run", run.name, "group", iteration, group + 1])}>next group</a>}
        <a href={href(["run", run.name, "episodes"], { iteration: String(iteration), task: data.task.id })}>in the list</a>
      </div>
      <section class="card">
        {prompt.map((message, index) => (
          <div key={index} class={`turn ${message.role}`}>
            <span class="role">{message.role}</span>
            <Long text={message.content} most={600} />
          </div>
        ))}
        {data.task.answer && (
          <p class="soft">
            gold answer: <Visible text={data.task.answer.slice(0, 300)} />
          </p>
        )}
      </section>
      <section aria-label="Token tree">
        <h3>
          Tokens: {number(data.unique_tokens)} in the tree, {number(data.all_tokens)} in separate sequences
        </h3>
        <Tree nodes={data.tree} place={place} />
      </section>
      <div class="attempts">
        {data.attempts.map((attempt, index) => (
          <article class="card attempt" key={index}>
            <h3>
              <a href={place(index)}>attempt {index + 1}</a>{" "}
              <span class={attempt.outcome?.success ? "good" : attempt.outcome ? "" : "bad"}>
                {attempt.outcome ? `${attempt.outcome.success ? "✓ " : ""}${attempt.stop}, reward ${number(attempt.outcome.reward)}` : "excluded"}
              </span>
            </h3>
            {attempt.fault && <p class="bad"><Long text={attempt.fault} most={300} /></p>}
            {attempt.steps.map((step, number_) => (
              <div class="brief" key={number_}>
                <div class="turn assistant">
                  <Long text={step.said} most={300} />
                  <span class="soft">
                    advantage {signed(step.advantage)} <Parts parts={step.rewards} />
                  </span>
                  <Events events={step.events} />
                </div>
                {step.seen.map((text, index_) => (
                  <div class="turn tool" key={index_}>
                    <Long text={text} most={300} />
                  </div>
                ))}
              </div>
            ))}
          </article>
        ))}
      </div>
    </>
  );
}

const LANE = 26;
const WIDTH = 1000;

interface Placed {
  node: GroupNode;
  from: number;
  to: number;
  lane: number;
  parent?: Placed;
}

// Each leaf has a lane; a node lies in the lane of its first leaf, as long as it has tokens.
function placed(nodes: GroupNode[]): { all: Placed[]; lanes: number } {
  const children = new Map<number | null, number[]>();
  nodes.forEach((node, index) => children.set(node.parent, [...(children.get(node.parent) ?? []), index]));
  const attemptOf = (index: number): number => {
    const step = nodes[index]!.step;
    if (step) return step[0];
    return Math.min(...(children.get(index) ?? []).map(attemptOf), Number.MAX_SAFE_INTEGER);
  };
  const all: Placed[] = [];
  let lanes = 0;
  const todo: [number, Placed | undefined, boolean][] = (children.get(null) ?? []).map((index) => [index, undefined, false]);
  while (todo.length) {
    const [index, parent, first] = todo.shift()!;
    const from = parent ? parent.to : 0;
    const here: Placed = { node: nodes[index]!, from, to: from + nodes[index]!.tokens, lane: first ? parent!.lane : lanes++, parent };
    all.push(here);
    const below = [...(children.get(index) ?? [])].sort((a, b) => attemptOf(a) - attemptOf(b));
    todo.unshift(...below.map((child, number_): [number, Placed, boolean] => [child, here, number_ === 0]));
  }
  return { all, lanes };
}

function Tree({ nodes, place }: { nodes: GroupNode[]; place: (attempt: number) => string }) {
  const { all, lanes } = placed(nodes);
  const longest = Math.max(1, ...all.map((item) => item.to));
  const x = (tokens: number) => (tokens / longest) * (WIDTH - 40) + 36;
  return (
    <>
      <p class="legend strong">
        <span class="key action" /> the agent wrote it <span class="key observation" /> the environment wrote it <span class="key context" />{" "}
        a rewritten history
      </p>
      <div class="scroll">
        <svg class="tree" viewBox={`0 0 ${WIDTH} ${lanes * LANE + 6}`} role="group" aria-label={`${all.length} runs of tokens in ${lanes} lanes`}>
          {all.map((item, index) => {
            const y = item.lane * LANE + 4;
            const width = Math.max(1.5, x(item.to) - x(item.from) - 1);
            const block = (
              <rect class={item.node.kind} x={x(item.from)} y={y} width={width} height={LANE - 8} rx="2">
                <title>{`${item.node.tokens} tokens: ${item.node.text}`}</title>
              </rect>
            );
            return (
              <g key={index}>
                {item.parent && item.lane !== item.parent.lane && (
                  <path class="branch" d={`M${x(item.from) - 1} ${item.parent.lane * LANE + LANE / 2} V${y + LANE / 2 - 4} H${x(item.from)}`} />
                )}
                {item.node.step ? (
                  <a href={place(item.node.step[0])} aria-label={`attempt ${item.node.step[0] + 1}, step ${item.node.step[1] + 1}`}>
                    {block}
                  </a>
                ) : (
                  block
                )}
                {item.node.step?.[1] === 0 && (
                  <text x="2" y={y + LANE / 2}>
                    {item.node.step[0] + 1}
                  </text>
                )}
              </g>
            );
          })}
        </svg>
      </div>
    </>
  );
}
