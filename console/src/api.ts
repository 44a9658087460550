/** Talks to the server of this page. Every URL is relative, so that a path prefix stays in it. */

import type { Page } from "./answers";

export interface Fault {
  field: string;
  problem: string;
  fix?: string;
}

/** What the server refused, in its own words. */
export class Refusal extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly faults: Fault[] = [],
  ) {
    super(message);
  }
}

/** Asks the person for a key; null where they decline. `problem`: why the last one did not do. */
export type AskForKey = (problem: string | null) => Promise<string | null>;
export type KeyState = "unneeded" | "given" | "declined";

let key: string | null = null;
let declined = false;
let ask: AskForKey = async () => null;
let asking: Promise<void> | null = null;
const listeners = new Set<() => void>();

export function askWith(asker: AskForKey): void {
  ask = asker;
}

export function keyState(): KeyState {
  if (key !== null) return "given";
  return declined ? "declined" : "unneeded";
}

/** Forget the key, and that none was given: the next request that needs one asks again. */
export function forgetKey(): void {
  setKey(null, false);
}

/** Call `listener` whenever a key is given or forgotten. Returns what ends that. */
export function onKeyChange(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function setKey(given: string | null, isDeclined: boolean): void {
  key = given;
  declined = isDeclined;
  for (const listener of listeners) listener();
}

/** Send a request, with the key that was given. Asks for a key where the server wants one. */
export async function send(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const sent = key;
    const headers = new Headers(init.headers);
    if (sent !== null) headers.set("Authorization", `Bearer ${sent}`);
    const answer = await fetch(path, { ...init, headers });
    if (answer.ok) return answer;
    const refusal = await refusalOf(answer);
    if (answer.status !== 401 || declined) throw refusal;
    // Requests that were refused at once share one question.
    if (key === sent) await (asking ??= askOnce(sent === null ? null : refusal.message));
    if (key === null) throw refusal;
  }
}

async function askOnce(problem: string | null): Promise<void> {
  const given = await ask(problem);
  asking = null;
  setKey(given, given === null);
}

async function refusalOf(answer: Response): Promise<Refusal> {
  const text = await answer.text();
  try {
    const { error } = JSON.parse(text);
    return new Refusal(answer.status, error.message, error.details ?? []);
  } catch {
    return new Refusal(answer.status, `The server answered ${answer.status}. ${text.slice(0, 200)}`);
  }
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await send(path, { signal })).json();
}

export async function sendJson<T>(
  method: string,
  path: string,
  body: unknown,
  signal?: AbortSignal,
): Promise<T> {
  const headers = { "Content-Type": "application/json" };
  const answer = await send(path, { method, headers, body: JSON.stringify(body), signal });
  return answer.json();
}

/** Every page of a list, up to so many entries. */
export async function all<T>(path: string, most: number): Promise<T[]> {
  const found: T[] = [];
  let next: string | null = "";
  while (next !== null && found.length < most) {
    const after: string = next && `&after=${encodeURIComponent(next)}`;
    const page: Page<T> = await get(`${path}?limit=1000${after}`);
    found.push(...page.data);
    next = page.next;
  }
  return found;
}

export function pathOf(adapter: string): string {
  return `v1/adapters/${adapter.split("/").map(encodeURIComponent).join("/")}`;
}

/** The events of a stream, parsed, as they come. */
export async function* events(answer: Response): AsyncGenerator<any> {
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refusal(500, event.error.message);
      yield event;
    }
  }
}
