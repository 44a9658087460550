/** The merges, with how far each is. */

import { useState } from "preact/hooks";
import type { Merge } from "./answers";
import { send } from "./api";
import { Problem, Wide, bytes, moment } from "./parts";

export function Merges({ merges, changed }: { merges: Merge[]; changed: () => void }) {
  const [error, setError] = useState<Error | null>(null);
  async function remove(id: string) {
    setError(null);
    try {
      await send(`v1/merges/${id}`, { method: "DELETE" });
    } catch (refused) {
      setError(refused as Error);
    }
    changed();
  }
  return (
    <section aria-labelledby="merges-title">
      <h2 id="merges-title">Merges</h2>
      <Problem error={error} />
      {merges.length === 0 ? (
        <p class="note">There are none.</p>
      ) : (
        <Wide label="Merges">
          <table>
            <thead>
              <tr>
                <th scope="col">Adapters</th>
                <th scope="col">Asked for</th>
                <th scope="col">State</th>
                <th scope="col" class="number">
                  Size
                </th>
                <th scope="col">
                  <span class="hidden">Action</span>
                </th>
              </tr>
            </thead>
            <tbody>
              {merges.toReversed().map((merge) => (
                <Row key={merge.id} merge={merge} remove={() => void remove(merge.id)} />
              ))}
            </tbody>
          </table>
        </Wide>
      )}
    </section>
  );
}

function Row({ merge, remove }: { merge: Merge; remove: () => void }) {
  const [sure, setSure] = useState(false);
  const adapters = merge.recipe.adapters.map((part) => part.name).join(" + ");
  const hasEnded = merge.state !== "queued" && merge.state !== "running";
  const word = hasEnded ? "Delete" : "Cancel";
  return (
    <tr>
      <th scope="row">{adapters}</th>
      <td>{moment(merge.created)}</td>
      <td>
        {merge.state}
        {!hasEnded && (
          <progress max={1} value={merge.progress} aria-label={`How far ${adapters} is`} />
        )}
        {merge.error && <small>{merge.error}</small>}
      </td>
      <td class="number">{merge.size === null ? "" : bytes(merge.size)}</td>
      <td>
        <button
          type="button"
          aria-label={`${word} the merge of ${adapters}`}
          onClick={() => (sure ? remove() : setSure(true))}
        >
          {sure ? `${word} for good` : word}
        </button>
      </td>
    </tr>
  );
}
