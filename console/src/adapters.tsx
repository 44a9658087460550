/** The page of the adapters: the list, and one of them beside it. */

import { useState } from "preact/hooks";
import type { Adapter, Batch } from "./answers";
import { all, get, send } from "./api";
import { Details } from "./details";
import { labelled, readMetrics } from "./metrics";
import { Problem, Wide, bytes, number, useLoaded } from "./parts";
import { Upload } from "./upload";

const MOST = 100_000;
const SHOWN = 200;

interface Traffic {
  requests: Map<string, number>;
  resident: Set<string>;
}

/** Who is on the device and how much each was asked; null where the key may not see it. */
async function traffic(signal: AbortSignal): Promise<Traffic | null> {
  try {
    const [batch, text] = await Promise.all([
      get<Batch>("debug/batch", signal),
      send("metrics", { signal }).then((answer) => answer.text()),
    ]);
    return {
      requests: labelled(readMetrics(text), "infuse_requests_total", "adapter"),
      resident: new Set(batch.slots.map((slot) => slot.adapter)),
    };
  } catch {
    return null;
  }
}

function matches(adapter: Adapter, words: string[]): boolean {
  const text = [adapter.name, adapter.description, ...adapter.tags].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

export function AdaptersPage({ of }: { of: string }) {
  const [search, setSearch] = useState("");
  const list = useLoaded(() => all<Adapter>("v1/adapters", MOST), []);
  const seen = useLoaded(traffic, []);
  const adapters = list.value ?? [];
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = adapters.filter((adapter) => matches(adapter, words));
  const chosen = adapters.find((adapter) => adapter.name === of);
  function reload() {
    list.reload();
    seen.reload();
  }
  return (
    <div class={chosen ? "beside" : undefined}>
      <section aria-labelledby="adapters-title">
        <div class="head">
          <h1 id="adapters-title">Adapters</h1>
          <label class="search">
            <span class="hidden">Search by name, description or tag</span>
            <input
              type="search"
              placeholder="Search names, texts, tags"
              value={search}
              onInput={(event) => setSearch(event.currentTarget.value)}
            />
          </label>
        </div>
        <Problem error={list.error} />
        <p role="status" class="note">
          {list.value && `${found.length} of ${adapters.length} adapters`}
          {found.length > SHOWN && `; the first ${SHOWN} are shown, search for the others`}
        </p>
        {found.length > 0 && (
          <Table adapters={found.slice(0, SHOWN)} seen={seen.value} chosen={of} tag={setSearch} />
        )}
        <Upload names={new Set(adapters.map((each) => each.name))} done={reload} />
      </section>
      {chosen && <Details key={chosen.name} adapter={chosen} changed={reload} />}
    </div>
  );
}

interface TableProps {
  adapters: Adapter[];
  seen: Traffic | null;
  chosen: string;
  tag: (tag: string) => void;
}

function Table({ adapters, seen, chosen, tag }: TableProps) {
  return (
    <Wide label="Adapters">
      <table>
        <thead>
          <tr>
            <th scope="col">Name</th>
            <th scope="col">State</th>
            <th scope="col">Tags</th>
            <th scope="col" class="number">
              Revision
            </th>
            <th scope="col" class="number">
              Size
            </th>
            {seen && (
              <th scope="col" class="number">
                Requests
              </th>
            )}
          </tr>
        </thead>
        <tbody>
          {adapters.map((adapter) => (
            <tr key={adapter.name} class={adapter.name === chosen ? "chosen" : undefined}>
              <th scope="row">
                <a
                  href={`#/adapters/${adapter.name}`}
                  aria-current={adapter.name === chosen || undefined}
                >
                  {adapter.name}
                </a>
                {adapter.description && <small>{adapter.description}</small>}
              </th>
              <td>
                <State adapter={adapter} resident={seen?.resident} />
              </td>
              <td>
                {adapter.tags.map((each) => (
                  <button key={each} type="button" class="tag" onClick={() => tag(each)}>
                    {each}
                  </button>
                ))}
              </td>
              <td class="number">{adapter.revision}</td>
              <td class="number">{bytes(adapter.size)}</td>
              {seen && <td class="number">{number(seen.requests.get(adapter.name) ?? 0)}</td>}
            </tr>
          ))}
        </tbody>
      </table>
    </Wide>
  );
}

function State({ adapter, resident }: { adapter: Adapter; resident?: Set<string> }) {
  const states = [];
  if (adapter.damaged) states.push(<span class="state bad">damaged</span>);
  if (!adapter.enabled) states.push(<span class="state">disabled</span>);
  if (adapter.pinned) states.push(<span class="state good">pinned</span>);
  else if (resident?.has(`${adapter.name}@${adapter.revision}`)) {
    states.push(<span class="state good">on the device</span>);
  }
  return <>{states.length > 0 ? states : <span class="note">stored</span>}</>;
}
