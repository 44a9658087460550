/** Adds an adapter from a folder that PEFT saved, or from an archive; its faults are shown here. */

import { downloadZip } from "client-zip";
import { useState } from "preact/hooks";
import type { Adapter } from "./answers";
import { pathOf, send } from "./api";
import { Problem } from "./parts";

interface Dropped {
  name: string;
  /** What is sent, as the field `archive` of a form. */
  archive: Blob;
  files: string[];
}

const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/;

/** One archive as it is, or an archive of several files. */
async function dropped(files: File[], folder: string): Promise<Dropped> {
  const [first] = files;
  if (first === undefined) throw new Error("There is no file in this folder.");
  if (files.length === 1 && ARCHIVE.test(first.name)) {
    return { name: nameOf(first.name.replace(ARCHIVE, "")), archive: first, files: [first.name] };
  }
  const named = files.map((file) => ({ name: file.name, input: file }));
  const archive = await downloadZip(named).blob();
  return { name: nameOf(folder), archive, files: files.map((file) => file.name) };
}

/** A name that the server takes, made of a file's. */
function nameOf(text: string): string {
  return text.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}

/** The files that were dropped: those of a folder, without its sub-folders. */
async function readDrop(transfer: DataTransfer): Promise<Dropped> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry());
  const folder = entries.find((entry) => entry?.isDirectory) as FileSystemDirectoryEntry | undefined;
  if (folder === undefined) return dropped([...transfer.files], "");
  const inside = folder.createReader();
  const files: File[] = [];
  for (;;) {
    // A reader gives some at a time, and none at the end.
    const some = await new Promise<FileSystemEntry[]>((done, failed) =>
      inside.readEntries(done, failed),
    );
    if (some.length === 0) return dropped(files, folder.name);
    for (const entry of some.filter((each) => each.isFile)) {
      files.push(
        await new Promise<File>((done, failed) =>
          (entry as FileSystemFileEntry).file(done, failed),
        ),
      );
    }
  }
}

function readChosen(list: FileList): Promise<Dropped> {
  const files = [...list];
  const [folder = "", ...below] = (files[0]?.webkitRelativePath ?? "").split("/");
  if (below.length === 0) return dropped(files, "");
  return dropped(
    files.filter((file) => file.webkitRelativePath.split("/").length === 2),
    folder,
  );
}

export function Upload({ names, done }: { names: Set<string>; done: () => void }) {
  const [given, setGiven] = useState<Dropped | null>(null);
  const [over, setOver] = useState(false);
  const [error, setError] = useState<Error | null>(null);
  function take(reading: Promise<Dropped>) {
    setError(null);
    reading.then(setGiven, setError);
  }
  return (
    <section
      class={over ? "drop over" : "drop"}
      aria-labelledby="upload-title"
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        if (event.dataTransfer) take(readDrop(event.dataTransfer));
      }}
    >
      <h2 id="upload-title">Add an adapter</h2>
      <p>Drop a folder that PEFT's <code>save_pretrained</code> wrote, or a zip or tar of it.</p>
      <div class="actions">
        <Pick label="Choose a folder" folder taken={(files) => take(readChosen(files))} />
        <Pick label="Choose files" taken={(files) => take(readChosen(files))} />
      </div>
      <Problem error={error} />
      {given && (
        <Send
          key={given.archive}
          given={given}
          names={names}
          done={done}
          drop={() => setGiven(null)}
        />
      )}
    </section>
  );
}

interface PickProps {
  label: string;
  folder?: boolean;
  taken: (files: FileList) => void;
}

function Pick({ label, folder, taken }: PickProps) {
  return (
    <label class="button">
      {label}
      <input
        class="hidden"
        type="file"
        multiple
        ref={(input) => void (input && (input.webkitdirectory = folder ?? false))}
        onChange={(event) => {
          const { files } = event.currentTarget;
          if (files?.length) taken(files);
          // The same folder can be chosen again, after its faults are mended.
          event.currentTarget.value = "";
        }}
      />
    </label>
  );
}

interface SendProps {
  given: Dropped;
  names: Set<string>;
  done: () => void;
  drop: () => void;
}

function Send({ given, names, done, drop }: SendProps) {
  const [name, setName] = useState(given.name);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<Error | null>(null);
  const [said, setSaid] = useState("");
  const replaces = names.has(name);
  async function upload(dryRun: boolean) {
    const form = new FormData();
    if (!replaces) form.append("name", name);
    form.append("archive", given.archive, "adapter.zip");
    const path = replaces ? pathOf(name) : "v1/adapters";
    setBusy(true);
    setError(null);
    setSaid("");
    try {
      const method = replaces ? "PUT" : "POST";
      const answer = await send(`${path}?dry_run=${dryRun}`, { method, body: form });
      const body = await answer.json();
      setSaid(dryRun ? fits(body) : stored(body));
      if (!dryRun) done();
    } catch (refused) {
      setError(refused as Error);
    }
    setBusy(false);
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        void upload(false);
      }}
    >
      <p class="note">{given.files.join(", ")}</p>
      <label>
        Name
        <input
          required
          value={name}
          onInput={(event) => setName(event.currentTarget.value)}
          autocomplete="off"
        />
      </label>
      <div class="actions">
        <button class="main" disabled={busy}>
          {replaces ? "Replace: a new revision" : "Add"}
        </button>
        <button type="button" disabled={busy} onClick={() => void upload(true)}>
          Check only
        </button>
        <button type="button" class="quiet" onClick={drop}>
          Leave it
        </button>
      </div>
      <Problem error={error} />
      <p role="status">{busy ? "The server checks it." : said}</p>
    </form>
  );
}

function fits(checked: { targets: number; warnings: string[] }): string {
  return [`It fits: it rescales ${checked.targets} modules.`, ...checked.warnings].join(" ");
}

function stored(adapter: Adapter): string {
  const is = adapter.unchanged ? "has this content already, as" : "is now";
  return [`${adapter.name} ${is} revision ${adapter.revision}.`, ...adapter.warnings].join(" ");
}
