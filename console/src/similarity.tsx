/** How alike adapters are: the cosines between what they change. */

import type { Similarity } from "./answers";
import { sendJson } from "./api";
import { Problem, Wide, useLoaded } from "./parts";

const MOST = 12;

export function SimilarityTable({ names, first }: { names: string[]; first: string }) {
  const chosen = [first, ...names.filter((name) => name !== first)].slice(0, MOST);
  const { value, error } = useLoaded<Similarity>(
    (signal) => sendJson("POST", "v1/adapters/similarity", { adapters: chosen }, signal),
    [chosen.join(" ")],
  );
  return (
    <section aria-labelledby="similarity-title">
      <h2 id="similarity-title">Similarity</h2>
      <p class="note">
        1: they change the base in the same direction. 0: they have nothing in common. -1: one undoes
        the other.
        {names.length > MOST && ` The chosen adapter and ${MOST - 1} more of ${names.length}.`}
      </p>
      <Problem error={error} />
      {value && (
        <Wide label="Similarity">
          <table class="matrix">
            <thead>
              <tr>
                <th scope="col">
                  <span class="hidden">Adapter</span>
                </th>
                {value.adapters.map((name) => (
                  <th key={name} scope="col" class="number">
                    {name}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {value.similarity.map((row, at) => (
                <tr key={at}>
                  <th scope="row">
                    <a href={`#/look/${value.adapters[at]}`}>{value.adapters[at]}</a>
                  </th>
                  {row.map((cosine, other) => (
                    <Cell key={other} cosine={cosine} />
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </Wide>
      )}
    </section>
  );
}

function Cell({ cosine }: { cosine: number | null }) {
  if (cosine === null) return <td class="number">none</td>;
  const colour = cosine > 0 ? "--amplify" : "--inhibit";
  // At most a third, so that the number can be read on it.
  const background = `rgba(var(${colour}), ${Math.abs(cosine) / 3})`;
  return (
    <td class="number" style={{ background }}>
      {cosine.toFixed(2)}
    </td>
  );
}
