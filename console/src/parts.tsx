/** What several pages use: loading, refusals, numbers in words. */

import type { ComponentChildren } from "preact";
import { useCallback, useEffect, useState } from "preact/hooks";
import { Refusal, onKeyChange } from "./api";

export interface Loaded<T> {
  value: T | null;
  error: Error | null;
  reload: () => void;
}

/** What `load` returns, loaded again when `inputs` change or a key is given. */
export function useLoaded<T>(
  load: (signal: AbortSignal) => Promise<T>,
  inputs: unknown[],
): Loaded<T> {
  const [value, setValue] = useState<T | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const [round, setRound] = useState(0);
  const reload = useCallback(() => setRound((before) => before + 1), []);
  useEffect(() => onKeyChange(reload), []);
  useEffect(() => {
    const abort = new AbortController();
    load(abort.signal).then(
      (found) => {
        if (abort.signal.aborted) return;
        setValue(found);
        setError(null);
      },
      (refused: Error) => abort.signal.aborted || setError(refused),
    );
    return () => abort.abort();
  }, [...inputs, round]);
  return { value, error, reload };
}

/** An error with its faults, read out at once. */
export function Problem({ error }: { error: Error | null }) {
  if (error === null) return null;
  const faults = error instanceof Refusal ? error.faults : [];
  return (
    <div class="problem" role="alert">
      <p>{error.message}</p>
      {faults.length > 0 && (
        <ul>
          {faults.map((fault) => (
            <li key={fault.field + fault.problem}>
              <code>{fault.field}</code> {fault.problem}
              {fault.fix && <span class="fix">Mend: {fault.fix}</span>}
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

/** A table that scrolls within itself where the page is narrow. */
export function Wide({ label, children }: { label: string; children: ComponentChildren }) {
  return (
    <div class="wide" role="group" aria-label={label} tabIndex={0}>
      {children}
    </div>
  );
}

export function Tile(props: { label: string; value: string; note?: string; share?: number }) {
  return (
    <div class="tile">
      <dt>{props.label}</dt>
      <dd>
        <strong>{props.value}</strong>
        {props.note && <small>{props.note}</small>}
        {props.share !== undefined && (
          <meter min={0} max={1} value={props.share} aria-label={`${props.label}, share in use`} />
        )}
      </dd>
    </div>
  );
}

export function bytes(count: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit === 0 ? count : count.toPrecision(3)} ${units[unit]}`;
}

export function number(count: number): string {
  return count.toLocaleString("en", { maximumFractionDigits: 1 });
}

export function seconds(count: number): string {
  return count < 1 ? `${Math.round(count * 1000)} ms` : `${count.toFixed(1)} s`;
}

export function moment(iso: string): string {
  return new Date(iso).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}
