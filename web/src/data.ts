// What the server answers, and how it is asked.

import { useEffect, useRef, useState } from "preact/hooks";

export type State = "running" | "finished" | "stopped" | "empty" | "broken";

export interface Summary {
  name: string;
  path: string;
  state: State;
  problem: string;
  iteration: number;
  iterations: number | null;
  success: number | null;
  validation: number | null;
  best: number | null;
  spark: number[];
  seconds_left: number | null;
  seconds: number;
  updated: number | null;
  algorithm: string | null;
  env: string | null;
  model: string | null;
}

export interface Runs {
  version: string;
  folders: string[];
  runs: Summary[];
  differences: Record<string, Record<string, unknown>>;
}

export interface Facets {
  episodes: number;
  iterations: number[];
  stops: Record<string, number>;
  categories: Record<string, number>;
  parts: Record<string, number>;
  events: Record<string, number>;
}

export interface Run extends Summary {
  recipe: Record<string, unknown>;
  result: { before: Numbers; after: Numbers; greedy: { before: Numbers; after: Numbers }; tasks: number } | null;
  facets: Facets;
  unread: number;
  damaged: Record<string, string>;
  numbers: Record<string, string>;
}

export type Numbers = Record<string, number | null>;

export interface Curves {
  iteration: number[];
  seconds: number[];
  figures: Record<string, (number | null)[]>;
}

export interface Row {
  iteration: number;
  group: number;
  attempt: number;
  task: string;
  category: string;
  stop: string;
  fault: string | null;
  success: number | null;
  reward: number | null;
  turns: number;
  tool_calls: number;
  action_tokens: number;
  tokens: number;
  question: string;
  answer: string;
  parts: Record<string, number>;
  events: Record<string, number>;
  [other: string]: unknown;
}

export interface Episodes {
  total: number;
  rows: Row[];
  unread: number;
}

export interface Call {
  name?: string;
  arguments?: Record<string, unknown>;
  malformed?: string;
  reason?: string;
  result: { name: string; text: string; error: string | null } | null;
}

export interface Message {
  role: string;
  content: string;
  cut: boolean;
  calls: Call[];
}

export interface Ending {
  stop: string;
  fault: string | null;
  outcome: { reward: number; success: boolean; metrics: Record<string, number> } | null;
  parts: Record<string, number>;
  discarded: number;
  seconds: number;
  num_tokens: number;
  action_tokens: number;
}

export interface Task {
  id: string;
  question: string;
  answer: string;
  category: string;
}

export interface Step {
  said: Message;
  seen: Message[];
  rewards: Record<string, number>;
  events: string[];
  state: string | null;
  stop: string;
  versions: [version: number, start: number, end: number][];
  rewritten: boolean;
  generate_seconds: number;
  env_seconds: number;
}

export type Kind = "action" | "observation" | "context";

export interface Tokens {
  id: number[];
  text: (string | null)[];
  kind: Kind[];
  step: number[];
  trained: boolean[];
  logprob: (number | null)[];
  entropy: (number | null)[];
  advantage: (number | null)[];
  ratio: (number | null)[];
  value: (number | null)[];
}

export interface Episode extends Ending {
  task: Task;
  attempts: number;
  question: string;
  prompt: Message[];
  steps: Step[];
  tokens: Tokens;
}

export interface GroupNode {
  parent: number | null;
  kind: Kind;
  tokens: number;
  step: [number, number] | null;
  text: string;
}

export interface Group {
  task: Task;
  attempts: (Ending & {
    prompt: { role: string; content: string }[];
    steps: { said: string; seen: string[]; rewards: Record<string, number>; events: string[]; advantage: number | null }[];
  })[];
  tree: GroupNode[];
  unique_tokens: number;
  all_tokens: number;
  is_last: boolean;
}

export interface Explanation {
  credit: string;
  group_returns: (number | null)[];
  steps: { counted: number; return: number }[];
  algorithms: { name: string; advantages: number[][]; weights: number[] }[];
  notes: string[];
}

export interface Finding {
  name: string;
  evidence: string;
  cure: string;
  episodes: Record<string, string>;
}

export interface Diagnosis {
  findings: Finding[];
  unread: number;
}

// Milliseconds until something that is done is asked for again.
const REST = 15000;

export interface Loaded<T> {
  data?: T;
  error?: string;
}

// Asks the server; with `every`, again after so many milliseconds for as long as the page is seen.
// It never stops to ask: what is done may go on.
export function useData<T>(url: string | null, every: number | ((data: T | undefined) => number) = REST): Loaded<T> {
  const [loaded, set] = useState<Loaded<T> & { url: string | null }>({ url: null });
  const wait = useRef(every);
  wait.current = every;
  useEffect(() => {
    if (url === null) return;
    let timer = 0;
    let data: T | undefined;
    const stop = new AbortController();
    const ask = async () => {
      if (document.visibilityState === "visible" || timer === 0) {
        try {
          const answer = await fetch(url, { signal: stop.signal });
          const found = await answer.json();
          if (stop.signal.aborted) return;
          if (answer.ok) data = found;
          set(answer.ok ? { url, data: found } : { url, data, error: found.error ?? answer.statusText });
        } catch (error) {
          if (stop.signal.aborted) return;
          set({ url, data, error: "no answer; does `agent-r1 view` still run?" });
        }
      }
      const pause = typeof wait.current === "function" ? wait.current(data) : wait.current;
      timer = window.setTimeout(ask, pause || REST);
    };
    ask();
    return () => {
      stop.abort();
      window.clearTimeout(timer);
    };
  }, [url]);
  return loaded.url === url ? loaded : {};
}

// Several addresses of one kind at once.
export function useAll<T>(urls: string[], every = 0): (T | undefined)[] {
  const [found, set] = useState<Record<string, T>>({});
  const key = urls.join("\n");
  useEffect(() => {
    let timer = 0;
    const stop = new AbortController();
    const ask = async () => {
      const answers = await Promise.all(
        urls.map(async (url) => {
          try {
            const answer = await fetch(url, { signal: stop.signal });
            return answer.ok ? ([url, (await answer.json()) as T] as const) : null;
          } catch {
            return null;
          }
        }),
      );
      if (stop.signal.aborted) return;
      set((before) => ({ ...before, ...Object.fromEntries(answers.filter((pair) => pair !== null)) }));
      if (every > 0) timer = window.setTimeout(ask, every);
    };
    ask();
    return () => {
      stop.abort();
      window.clearTimeout(timer);
    };
  }, [key, every]);
  return urls.map((url) => found[url]);
}

export const path = (kind: string, run: string, ...place: (string | number)[]) =>
  ["/api", kind, ...place, ...run.split("/").map(encodeURIComponent)].join("/");
