/** The answers of the API, as far as the console reads them. */

export interface Adapter {
  name: string;
  revision: number;
  digest: string;
  size: number;
  created: string;
  source: string;
  by: string | null;
  recipe: Record<string, unknown> | null;
  damaged: boolean;
  description: string;
  tags: string[];
  pinned: boolean;
  enabled: boolean;
  warnings: string[];
  unchanged: boolean;
}

export type Revision = Pick<
  Adapter,
  "revision" | "digest" | "size" | "created" | "source" | "by" | "damaged"
>;

export interface Page<T> {
  data: T[];
  next: string | null;
}

export interface Model {
  id: string;
  parent: string | null;
}

export interface Module {
  module: string;
  layer: number | null;
  kind: string;
  side: "input" | "output";
  size: number;
  min: number;
  max: number;
  mean: number;
  norm: number;
  amplified: number;
  inhibited: number;
  histogram: number[];
  columns: number[];
}

export interface Vectors {
  adapters: { name: string; weight: number }[];
  bounds: number[];
  modules: Module[];
  whole_modules: string[];
}

export interface Similarity {
  adapters: string[];
  similarity: (number | null)[][];
}

export interface RequestNow {
  id: string;
  key: string;
  adapter: string;
  prompt_tokens: number;
  completion_tokens: number;
  queue_seconds: number;
  prefill_seconds: number;
  decode_seconds: number;
  preempted: boolean;
  waits_for: string | null;
}

export interface Slot {
  slot: number;
  adapter: string;
  running: number;
  leases: number;
  pinned: boolean;
}

export interface Batch {
  batch_rows: number;
  running: RequestNow[];
  waiting: RequestNow[];
  preparing: { request_id: string; key: string; waits_for: string | null; seconds: number }[];
  kv_tokens_used: number;
  kv_tokens_limit: number;
  slots_limit: number;
  slots: Slot[];
}

export interface Merge {
  id: string;
  state: string;
  progress: number;
  recipe: { adapters: { name: string; weight: number }[]; method: string };
  created: string;
  size: number | null;
  error: string | null;
}
