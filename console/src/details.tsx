/** One adapter: what can be changed of it, and its revisions. */

import { useState } from "preact/hooks";
import type { Adapter, Revision } from "./answers";
import { get, pathOf, send, sendJson } from "./api";
import { Problem, Wide, bytes, moment, useLoaded } from "./parts";

interface DetailsProps {
  adapter: Adapter;
  changed: () => void;
}

export function Details({ adapter, changed }: DetailsProps) {
  const path = pathOf(adapter.name);
  const revisions = useLoaded(
    (signal) => get<{ data: Revision[] }>(`${path}/revisions`, signal),
    [adapter.digest, adapter.revision],
  );
  const [error, setError] = useState<Error | null>(null);
  const [said, setSaid] = useState("");
  async function change(what: () => Promise<unknown>, done: string) {
    setError(null);
    setSaid("");
    try {
      await what();
      setSaid(done);
      changed();
    } catch (refused) {
      setError(refused as Error);
    }
  }
  const describe = (body: object, done: string) =>
    change(() => sendJson("PATCH", path, body), done);
  return (
    <section class="panel" aria-labelledby="adapter-title">
      <div class="head">
        <h2 id="adapter-title">{adapter.name}</h2>
        <a href="#/adapters" class="button quiet">
          Close
        </a>
      </div>
      <Texts key={adapter.description + adapter.tags} adapter={adapter} save={describe} />
      <div class="actions">
        <Switch
          label="Pinned on the device"
          on={adapter.pinned}
          set={(pinned) => describe({ pinned }, pinned ? "It is pinned." : "It is unpinned.")}
        />
        <Switch
          label="Enabled"
          on={adapter.enabled}
          set={(enabled) => describe({ enabled }, enabled ? "It is enabled." : "It is disabled.")}
        />
      </div>
      <Problem error={error} />
      <p role="status">{said}</p>
      <div class="actions">
        <a class="button" href={`#/look/${adapter.name}`}>
          Look inside
        </a>
        <a class="button" href={`#/compare/${adapter.name}`}>
          Compare
        </a>
        <Delete name={adapter.name} remove={() => change(() => remove(path), "It is deleted.")} />
      </div>
      <h3>Revisions</h3>
      <Problem error={revisions.error} />
      <Revisions
        revisions={revisions.value?.data ?? []}
        current={adapter.revision}
        rollBack={(revision) =>
          change(
            () => sendJson("POST", `${path}/rollback`, { revision }),
            `It has the content of revision ${revision} again.`,
          )
        }
      />
    </section>
  );
}

async function remove(path: string): Promise<void> {
  await send(path, { method: "DELETE" });
  location.hash = "#/adapters";
}

interface TextsProps {
  adapter: Adapter;
  save: (body: object, done: string) => Promise<void>;
}

function Texts({ adapter, save }: TextsProps) {
  const [description, setDescription] = useState(adapter.description);
  const [tags, setTags] = useState(adapter.tags.join(", "));
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        const words = tags.split(",").map((tag) => tag.trim());
        void save({ description, tags: words.filter(Boolean) }, "The texts are saved.");
      }}
    >
      <label>
        Description
        <input
          value={description}
          onInput={(event) => setDescription(event.currentTarget.value)}
        />
      </label>
      <label>
        Tags, with commas between
        <input value={tags} onInput={(event) => setTags(event.currentTarget.value)} />
      </label>
      <button class="short">Save texts</button>
    </form>
  );
}

function Switch(props: { label: string; on: boolean; set: (on: boolean) => void }) {
  return (
    <label class="switch">
      <input
        type="checkbox"
        role="switch"
        checked={props.on}
        onChange={(event) => props.set(event.currentTarget.checked)}
      />
      {props.label}
    </label>
  );
}

/** A deletion is asked for twice. */
function Delete({ name, remove }: { name: string; remove: () => void }) {
  const [sure, setSure] = useState(false);
  return (
    <button type="button" class="danger" onClick={() => (sure ? remove() : setSure(true))}>
      {sure ? `Delete ${name} for good` : "Delete"}
    </button>
  );
}

interface RevisionsProps {
  revisions: Revision[];
  current: number;
  rollBack: (revision: number) => void;
}

function Revisions({ revisions, current, rollBack }: RevisionsProps) {
  return (
    <Wide label="Revisions">
      <table>
        <thead>
          <tr>
            <th scope="col">Revision</th>
            <th scope="col">Made</th>
            <th scope="col" class="number">
              Size
            </th>
            <th scope="col">
              <span class="hidden">Action</span>
            </th>
          </tr>
        </thead>
        <tbody>
          {revisions.map((each) => (
            <tr key={each.revision}>
              <th scope="row" class="narrow">{each.revision}</th>
              <td>
                {moment(each.created)}
                <small>{[each.source, each.by].filter(Boolean).join(", by ")}</small>
              </td>
              <td class="number">{bytes(each.size)}</td>
              <td>
                {each.revision === current ? (
                  <span class="note">current</span>
                ) : (
                  <button
                    type="button"
                    aria-label={`Roll back to revision ${each.revision}`}
                    onClick={() => rollBack(each.revision)}
                  >
                    Roll back
                  </button>
                )}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </Wide>
  );
}
