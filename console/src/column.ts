/** What a column of the comparison runs on, and its answer as it comes. */

import { events, send } from "./api";

export interface Part {
  name: string;
  weight: number;
}

export type Composition = "product" | "linear";

/** The base where there are no parts, one adapter, or a mixture. */
export interface Column {
  id: number;
  parts: Part[];
  composition: Composition;
}

export interface Ask {
  prompt: string;
  chat: boolean;
  maxTokens: number;
  temperature: number;
}

export interface Alternative {
  text: string;
  logprob: number;
}

export interface Token extends Alternative {
  top: Alternative[];
}

export interface Answer {
  tokens: Token[];
  state: "running" | "done" | "stopped" | "failed";
  finish: string | null;
  error: Error | null;
}

const TOP = 5;

export function titleOf(column: Column): string {
  if (column.parts.length === 0) return "Base model";
  return column.parts.map((part) => part.name).join(" + ");
}

function modelOf(column: Column, base: string): object {
  const [first, ...more] = column.parts;
  if (first === undefined) return { model: base };
  // A strength, be it 1, makes a mixture of it.
  if (more.length === 0 && first.weight === 1) return { model: first.name };
  if (more.length === 0) return { model: first.name, strength: first.weight };
  return { model: base, adapters: column.parts, composition: column.composition };
}

/** Stream the answer of one column; `told` is called with each piece. */
export async function run(
  column: Column,
  ask: Ask,
  base: string,
  signal: AbortSignal,
  told: (answer: Answer) => void,
): Promise<void> {
  const answer: Answer = { tokens: [], state: "running", finish: null, error: null };
  told(answer);
  const asked = ask.chat
    ? { messages: [{ role: "user", content: ask.prompt }], logprobs: true, top_logprobs: TOP }
    : { prompt: ask.prompt, logprobs: TOP };
  const body = {
    ...modelOf(column, base),
    ...asked,
    stream: true,
    max_tokens: ask.maxTokens,
    temperature: ask.temperature,
    seed: 0,
  };
  try {
    const path = ask.chat ? "v1/chat/completions" : "v1/completions";
    const headers = { "Content-Type": "application/json" };
    const init = { method: "POST", headers, body: JSON.stringify(body), signal };
    for await (const event of events(await send(path, init))) {
      for (const choice of event.choices) {
        answer.tokens = [...answer.tokens, ...(ask.chat ? chatTokens : plainTokens)(choice.logprobs)];
        answer.finish = choice.finish_reason ?? answer.finish;
        told({ ...answer });
      }
    }
    told({ ...answer, state: "done" });
  } catch (error) {
    if (signal.aborted) told({ ...answer, state: "stopped" });
    else told({ ...answer, state: "failed", error: error as Error });
  }
}

interface ChatLogprobs {
  content: { token: string; logprob: number; top_logprobs: { token: string; logprob: number }[] }[];
}

function chatTokens(logprobs: ChatLogprobs | null): Token[] {
  return (logprobs?.content ?? []).map((each) => ({
    text: each.token,
    logprob: each.logprob,
    top: each.top_logprobs.map(({ token, logprob }) => ({ text: token, logprob })),
  }));
}

interface PlainLogprobs {
  tokens: string[];
  token_logprobs: number[];
  top_logprobs: Record<string, number>[] | null;
}

function plainTokens(logprobs: PlainLogprobs | null): Token[] {
  return (logprobs?.tokens ?? []).map((text, index) => ({
    text,
    logprob: logprobs!.token_logprobs[index] ?? 0,
    top: Object.entries(logprobs!.top_logprobs?.[index] ?? {})
      .map(([text, logprob]) => ({ text, logprob }))
      .sort((one, other) => other.logprob - one.logprob)
      .slice(0, TOP),
  }));
}

/** How the same parts are asked with every strength of a sweep. */
export const STRENGTHS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2];

export function sweepOf(column: Column, id: () => number): Column[] {
  return STRENGTHS.map((strength) => ({
    ...column,
    id: id(),
    parts: column.parts.map((part) => ({
      name: part.name,
      weight: Math.round(part.weight * strength * 100) / 100,
    })),
  }));
}
