/** The page that shows what the server does now. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Batch, Merge } from "./answers";
import { Refusal, all, get, onKeyChange, send } from "./api";
import { Merges } from "./merges";
import { type Metrics, labelled, quantile, readMetrics, total } from "./metrics";
import { Problem, Tile, Wide, bytes, number, seconds } from "./parts";

const EVERY = 1000;
const KEPT = 120;

interface Look {
  at: number;
  batch: Batch;
  metrics: Metrics;
  merges: Merge[];
  /** Tokens that were generated up to now, those of unfinished answers too. */
  tokens: number;
}

async function look(signal: AbortSignal): Promise<Look> {
  const [batch, text, merges] = await Promise.all([
    get<Batch>("debug/batch", signal),
    send("metrics", { signal }).then((answer) => answer.text()),
    all<Merge>("v1/merges", 1000),
  ]);
  const metrics = readMetrics(text);
  const unfinished = [...batch.running, ...batch.waiting].reduce(
    (sum, each) => sum + each.completion_tokens,
    0,
  );
  const tokens = total(metrics, "infuse_generated_tokens_total") + unfinished;
  return { at: performance.now(), batch, metrics, merges, tokens };
}

/** The latest looks at the server, one a second while the page can be seen. */
function useLooks(): { looks: Look[]; error: Error | null; lookNow: () => void } {
  const [looks, setLooks] = useState<Look[]>([]);
  const [error, setError] = useState<Error | null>(null);
  const lookNow = useRef(() => undefined as void);
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    async function again() {
      clearTimeout(timer);
      if (!document.hidden) {
        try {
          const seen = await look(abort.signal);
          setLooks((before) => [...before, seen].slice(-KEPT));
          setError(null);
        } catch (failed) {
          if (abort.signal.aborted) return;
          setError(failed as Error);
          // A key that is missing or may not see this changes nothing by itself.
          if (failed instanceof Refusal && failed.status < 500) return;
        }
      }
      if (!abort.signal.aborted) timer = setTimeout(again, EVERY);
    }
    lookNow.current = () => void again();
    void again();
    const forget = onKeyChange(again);
    return () => {
      forget();
      abort.abort();
      clearTimeout(timer);
    };
  }, []);
  return { looks, error, lookNow: () => lookNow.current() };
}

/** Tokens a second between each two looks. */
function rates(looks: Look[]): number[] {
  return looks.slice(1).map((look, index) => {
    const before = looks[index]!;
    return Math.max(0, (1000 * (look.tokens - before.tokens)) / (look.at - before.at));
  });
}

export function ServePage() {
  const { looks, error, lookNow } = useLooks();
  const now = looks.at(-1);
  return (
    <>
      <h1>Serve</h1>
      <Problem error={error} />
      {now && (
        <>
          <Tiles now={now} rates={rates(looks)} />
          <Running batch={now.batch} />
          <Waiting batch={now.batch} />
          <Slots batch={now.batch} />
          <Memory metrics={now.metrics} />
          <Merges merges={now.merges} changed={lookNow} />
        </>
      )}
    </>
  );
}

function Tiles({ now, rates }: { now: Look; rates: number[] }) {
  const { batch, metrics } = now;
  const lately = rates.slice(-5);
  const rate = lately.reduce((sum, each) => sum + each, 0) / (lately.length || 1);
  const ttft = quantile(metrics, "infuse_time_to_first_token_seconds", 0.5);
  const late = quantile(metrics, "infuse_time_to_first_token_seconds", 0.95);
  const capacity = total(metrics, "infuse_requests_waiting_limit");
  const asked = total(metrics, "infuse_prefix_cache_query_tokens_total");
  const hits = total(metrics, "infuse_prefix_cache_hit_tokens_total");
  return (
    <dl class="tiles">
      <Tile
        label="Running"
        value={`${batch.running.length}`}
        note={`of ${batch.batch_rows} batch rows`}
        share={batch.running.length / batch.batch_rows}
      />
      <Tile
        label="Waiting"
        value={`${batch.waiting.length}`}
        note={`of ${number(capacity)} in the queue`}
        share={capacity ? batch.waiting.length / capacity : 0}
      />
      <div class="tile">
        <dt>Tokens a second</dt>
        <dd>
          <strong>{number(rate)}</strong>
          <Spark values={rates} />
        </dd>
      </div>
      <Tile
        label="Time to first token"
        value={ttft === null ? "none yet" : seconds(ttft)}
        note={late === null ? undefined : `95 % within ${seconds(late)}, since the start`}
      />
      <Tile
        label="KV cache"
        value={number(batch.kv_tokens_used)}
        note={`of ${number(batch.kv_tokens_limit)} tokens`}
        share={batch.kv_tokens_used / batch.kv_tokens_limit}
      />
      <Tile
        label="Prefix cache"
        value={asked ? `${Math.round((100 * hits) / asked)} %` : "none yet"}
        note="of prompt tokens were cached"
      />
      <Tile
        label="Slots"
        value={`${batch.slots.length}`}
        note={`of ${batch.slots_limit} adapters on the device`}
        share={batch.slots.length / batch.slots_limit}
      />
    </dl>
  );
}

function Spark({ values }: { values: number[] }) {
  const most = Math.max(1, ...values);
  const points = values.map((value, at) => `${(at * 100) / KEPT},${29 - (28 * value) / most}`);
  return (
    <svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
      <polyline points={points.join(" ")} />
    </svg>
  );
}

const WAITS: Record<string, string> = {
  turn: "others are before it",
  row: "the batch is full",
  slot: "no slot is free for its adapter",
  blocks: "the KV cache has no room for its prompt",
  prefix: "a running request computes how its prompt begins",
};

function Running({ batch }: { batch: Batch }) {
  return (
    <section aria-labelledby="running-title">
      <h2 id="running-title">The batch now</h2>
      {batch.running.length === 0 ? (
        <p class="note">Nothing runs.</p>
      ) : (
        <Wide label="The batch now">
          <table>
            <thead>
              <tr>
                <th scope="col">Request</th>
                <th scope="col">Adapter</th>
                {["Prompt", "Answer", "Queue", "Prefill", "Decode"].map((head) => (
                  <th key={head} scope="col" class="number">
                    {head}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {batch.running.map((each) => (
                <tr key={each.id}>
                  <th scope="row">
                    <code>{each.id}</code>
                    {each.key && <small>{each.key}</small>}
                  </th>
                  <td>{each.adapter || "base"}</td>
                  <td class="number">{each.prompt_tokens}</td>
                  <td class="number">{each.completion_tokens}</td>
                  <td class="number">{seconds(each.queue_seconds)}</td>
                  <td class="number">{seconds(each.prefill_seconds)}</td>
                  <td class="number">{seconds(each.decode_seconds)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </Wide>
      )}
    </section>
  );
}

function Waiting({ batch }: { batch: Batch }) {
  const waiting = batch.waiting.map(({ id, adapter, waits_for, preempted, queue_seconds }) => ({
    id,
    of: adapter || "base",
    why: preempted ? "to be computed again" : (WAITS[waits_for ?? ""] ?? "it begins"),
    seconds: queue_seconds,
  }));
  const preparing = batch.preparing.map((each) => ({
    id: each.request_id,
    of: "being prepared",
    why: each.waits_for ?? "its prompt is made",
    seconds: each.seconds,
  }));
  const rows = [...waiting, ...preparing];
  return (
    <section aria-labelledby="waiting-title">
      <h2 id="waiting-title">Waiting</h2>
      {rows.length === 0 ? (
        <p class="note">Nothing waits.</p>
      ) : (
        <Wide label="Waiting">
          <table>
            <thead>
              <tr>
                <th scope="col">Request</th>
                <th scope="col">Adapter</th>
                <th scope="col">Why</th>
                <th scope="col" class="number">
                  So far
                </th>
              </tr>
            </thead>
            <tbody>
              {rows.map((each) => (
                <tr key={each.id}>
                  <th scope="row">
                    <code>{each.id}</code>
                  </th>
                  <td>{each.of}</td>
                  <td>{each.why}</td>
                  <td class="number">{seconds(each.seconds)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </Wide>
      )}
    </section>
  );
}

function Slots({ batch }: { batch: Batch }) {
  if (batch.slots.length === 0) return null;
  return (
    <section aria-labelledby="slots-title">
      <h2 id="slots-title">Adapters on the device</h2>
      <ul class="slots">
        {batch.slots.map((slot) => (
          <li key={slot.slot} class={slot.running > 0 ? "used" : undefined}>
            {slot.adapter || "pinned, not asked for yet"}
            <small>
              {slot.running > 0 ? `${slot.running} running` : slot.pinned ? "pinned" : "idle"}
            </small>
          </li>
        ))}
      </ul>
    </section>
  );
}

function Memory({ metrics }: { metrics: Metrics }) {
  const parts = [...labelled(metrics, "infuse_memory_bytes", "part")];
  const all = parts.reduce((sum, [, size]) => sum + size, 0);
  const used = total(metrics, "process_resident_memory_bytes");
  return (
    <section aria-labelledby="memory-title">
      <h2 id="memory-title">Memory</h2>
      <p class="note">The server's process has {bytes(used)}. Planned:</p>
      <dl class="tiles">
        {parts.map(([part, size]) => (
          <Tile
            key={part}
            label={part.replace(/_/g, " ")}
            value={bytes(size)}
            share={all ? size / all : 0}
          />
        ))}
      </dl>
    </section>
  );
}
