/** The page that shows what an adapter, or a combination, amplifies and inhibits. */

import { useState } from "preact/hooks";
import type { Adapter, Vectors } from "./answers";
import { all, get, pathOf, sendJson } from "./api";
import { Histogram, NormByLayer } from "./charts";
import { HeatMaps } from "./heatmap";
import { Problem, Wide, useLoaded } from "./parts";
import { SimilarityTable } from "./similarity";

const MOST = 100_000;
const COLUMNS = 96;
const METHODS = ["task_arithmetic", "linear", "product", "ties", "dare_linear", "dare_ties"];

interface Combination {
  adapters: { name: string; weight: number }[];
  method: string;
}

export function LookPage({ of }: { of: string }) {
  const list = useLoaded(() => all<Adapter>("v1/adapters", MOST), []);
  const names = (list.value ?? []).map((adapter) => adapter.name);
  const name = of || names[0] || "";
  const [combined, setCombined] = useState<Combination | null>(null);
  const alone = useLoaded<Vectors | null>(
    async (signal) =>
      name ? get(`${pathOf(name)}/vectors?columns=${COLUMNS}`, signal) : null,
    [name],
  );
  const together = useLoaded<Vectors | null>(
    async (signal) =>
      combined &&
      sendJson("POST", "v1/adapters/vectors", { ...combined, columns: COLUMNS }, signal),
    [combined],
  );
  return (
    <>
      <div class="head">
        <h1>Look inside</h1>
        <label>
          Adapter
          <select
            value={name}
            onChange={(event) => (location.hash = `#/look/${event.currentTarget.value}`)}
          >
            {names.map((each) => (
              <option key={each} value={each}>
                {each}
              </option>
            ))}
          </select>
        </label>
      </div>
      <Problem error={list.error ?? alone.error} />
      {list.value?.length === 0 && <p>There is no adapter yet: add one on the page Adapters.</p>}
      {alone.value && <Inside title={name} vectors={alone.value} />}
      {list.value && name && <Combine key={name} names={names} first={name} combine={setCombined} />}
      <Problem error={together.error} />
      {combined && together.value && (
        <Inside title={`${combined.method} of the above`} vectors={together.value} />
      )}
      {names.length > 1 && <SimilarityTable names={names} first={name} />}
    </>
  );
}

function Inside({ title, vectors }: { title: string; vectors: Vectors }) {
  const { modules } = vectors;
  const [kind, setKind] = useState("");
  const kinds = [...new Set(modules.map((each) => each.kind))];
  const shown = kinds.includes(kind) ? modules.filter((each) => each.kind === kind) : modules;
  return (
    <section aria-label={`Inside ${title}`}>
      <h2>{title}</h2>
      <p class="note">
        {modules.length} vectors.
        {vectors.whole_modules.length > 0 &&
          ` It also brings whole modules: ${vectors.whole_modules.join(", ")}.`}
      </p>
      <HeatMaps modules={modules} />
      <div class="pair">
        <figure>
          <figcaption>Norm of the change, by layer</figcaption>
          <NormByLayer modules={modules} />
        </figure>
        <figure>
          <figcaption>
            <label>
              Histogram of the factors
              <select value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
                <option value="">in all modules</option>
                {kinds.map((each) => (
                  <option key={each} value={each}>
                    in {each}
                  </option>
                ))}
              </select>
            </label>
          </figcaption>
          <Histogram bounds={vectors.bounds} modules={shown} />
        </figure>
      </div>
      <details>
        <summary>All vectors in numbers</summary>
        <Numbers vectors={vectors} />
      </details>
    </section>
  );
}

function Numbers({ vectors }: { vectors: Vectors }) {
  return (
    <Wide label="All vectors in numbers">
      <table>
        <thead>
          <tr>
            <th scope="col">Module</th>
            <th scope="col">Side</th>
            {["Least", "Mean", "Most", "Norm", "Amplified", "Inhibited"].map((head) => (
              <th key={head} scope="col" class="number">
                {head}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {vectors.modules.map((each) => (
            <tr key={each.module + each.side}>
              <th scope="row">
                <code>{each.module}</code>
              </th>
              <td>{each.side}</td>
              {[each.min, each.mean, each.max, each.norm].map((value, at) => (
                <td key={at} class="number">
                  {value.toFixed(3)}
                </td>
              ))}
              {[each.amplified, each.inhibited].map((share, at) => (
                <td key={at} class="number">
                  {Math.round(100 * share)} %
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Wide>
  );
}

interface CombineProps {
  names: string[];
  first: string;
  combine: (combination: Combination | null) => void;
}

/** What a combination would change. Nothing is stored. */
function Combine({ names, first, combine }: CombineProps) {
  const [method, setMethod] = useState(METHODS[0]!);
  const [second, setSecond] = useState(names.find((name) => name !== first) ?? first);
  const [weights, setWeights] = useState([0.5, 0.5]);
  const parts = [first, second];
  return (
    <form
      class="combine"
      aria-label="Combine"
      onSubmit={(event) => {
        event.preventDefault();
        const adapters = parts.map((name, at) => ({ name, weight: weights[at] ?? 1 }));
        combine({ adapters, method });
      }}
    >
      <h2>What a combination changes</h2>
      <p class="note">Nothing is stored: the server computes what it would be.</p>
      <div class="actions">
        <label>
          Weight of {first}
          <WeightField value={weights[0]!} set={(weight) => setWeights([weight, weights[1]!])} />
        </label>
        <label>
          With
          <select value={second} onChange={(event) => setSecond(event.currentTarget.value)}>
            {names.map((each) => (
              <option key={each}>{each}</option>
            ))}
          </select>
        </label>
        <label>
          Weight of {second}
          <WeightField value={weights[1]!} set={(weight) => setWeights([weights[0]!, weight])} />
        </label>
        <label>
          Method
          <select value={method} onChange={(event) => setMethod(event.currentTarget.value)}>
            {METHODS.map((each) => (
              <option key={each}>{each}</option>
            ))}
          </select>
        </label>
        <button class="main">Show</button>
      </div>
    </form>
  );
}

function WeightField({ value, set }: { value: number; set: (weight: number) => void }) {
  return (
    <input
      type="number"
      min={-16}
      max={16}
      step={0.05}
      value={value}
      onInput={(event) => set(event.currentTarget.valueAsNumber || 0)}
    />
  );
}
