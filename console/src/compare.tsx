/** The page that asks up to eight columns the same, side by side. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Model } from "./answers";
import { all } from "./api";
import { type Answer, type Ask, type Column, run, sweepOf, titleOf } from "./column";
import { ColumnCard } from "./columncard";
import { Problem, useLoaded } from "./parts";

const MOST_COLUMNS = 8;
const MOST_MODELS = 100_000;
/** Milliseconds without a move of a slider, until its column runs again. */
const SETTLED = 250;

let ids = 0;
const nextId = () => ++ids;
const columnOf = (...names: string[]): Column => ({
  id: nextId(),
  parts: names.map((name) => ({ name, weight: 1 })),
  composition: "product",
});

/** The answers by column, and what runs or stops them. */
function useAnswers(base: string) {
  const [answers, setAnswers] = useState(new Map<number, Answer>());
  const running = useRef(new Map<number, AbortController>());
  const stop = (id: number) => running.current.get(id)?.abort();
  function start(column: Column, ask: Ask) {
    stop(column.id);
    const abort = new AbortController();
    running.current.set(column.id, abort);
    void run(column, ask, base, abort.signal, (answer) => {
      // A run that another one has replaced has nothing to say.
      if (running.current.get(column.id) !== abort) return;
      setAnswers((before) => {
        // What was answered last stays until the first token comes, and who reads it at its place.
        const waits = answer.state === "running" && answer.tokens.length === 0;
        const last = waits ? before.get(column.id) : undefined;
        const shown = last === undefined ? answer : { ...last, state: answer.state, error: null };
        return new Map(before).set(column.id, shown);
      });
    });
  }
  const stopAll = () => running.current.forEach((abort) => abort.abort());
  useEffect(() => stopAll, []);
  return { answers, start, stop, stopAll };
}

export function ComparePage({ of }: { of: string }) {
  const models = useLoaded(() => all<Model>("v1/models", MOST_MODELS), []);
  const base = models.value?.find((model) => model.parent === null)?.id ?? "";
  const names = useMemo(
    () => (models.value ?? []).filter((model) => model.parent !== null).map((model) => model.id),
    [models.value],
  );
  const [columns, setColumns] = useState(() => [columnOf(), ...(of ? [columnOf(of)] : [])]);
  const [ask, setAsk] = useState<Ask>({ prompt: "", chat: true, maxTokens: 64, temperature: 0 });
  const { answers, start, stop, stopAll } = useAnswers(base);
  const settling = useRef(new Map<number, number>());
  const isRunning = columns.some((column) => answers.get(column.id)?.state === "running");

  function runAll(each: Column[]) {
    for (const column of each) start(column, ask);
  }
  function change(column: Column) {
    setColumns(columns.map((each) => (each.id === column.id ? column : each)));
    // What was asked already is asked again, once the slider rests.
    if (!answers.has(column.id) || !ask.prompt) return;
    clearTimeout(settling.current.get(column.id));
    settling.current.set(column.id, setTimeout(() => start(column, ask), SETTLED));
  }
  function sweep(column: Column) {
    stopAll();
    const swept = sweepOf(column, nextId);
    setColumns(swept);
    if (ask.prompt) runAll(swept);
  }
  function remove(column: Column) {
    stop(column.id);
    setColumns(columns.filter((each) => each.id !== column.id));
  }

  return (
    <>
      <h1>Compare</h1>
      <Problem error={models.error} />
      <AskForm
        ask={ask}
        set={setAsk}
        isRunning={isRunning}
        run={() => runAll(columns)}
        stop={stopAll}
        canRun={base !== "" && columns.length > 0}
      />
      <datalist id="adapter-names">
        {names.map((name) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      <div class="columns">
        {columns.map((column) => (
          <ColumnCard
            key={column.id}
            column={column}
            names={names}
            answer={answers.get(column.id)}
            change={change}
            sweep={() => sweep(column)}
            remove={() => remove(column)}
          />
        ))}
        {columns.length < MOST_COLUMNS && (
          <Add names={names} add={(...parts) => setColumns([...columns, columnOf(...parts)])} />
        )}
      </div>
      <p class="hidden" role="status">
        {columns
          .filter((column) => answers.get(column.id)?.state === "done")
          .map((column) => `${titleOf(column)} has answered.`)
          .join(" ")}
      </p>
    </>
  );
}

interface AskProps {
  ask: Ask;
  set: (ask: Ask) => void;
  isRunning: boolean;
  canRun: boolean;
  run: () => void;
  stop: () => void;
}

function AskForm({ ask, set, isRunning, canRun, run, stop }: AskProps) {
  return (
    <form
      class="ask"
      onSubmit={(event) => {
        event.preventDefault();
        run();
      }}
    >
      <label>
        Prompt
        <textarea
          required
          rows={3}
          value={ask.prompt}
          onInput={(event) => set({ ...ask, prompt: event.currentTarget.value })}
          onKeyDown={(event) => {
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
              event.currentTarget.form?.requestSubmit();
            }
          }}
        />
      </label>
      <div class="actions">
        <label>
          As
          <select
            value={ask.chat ? "chat" : "plain"}
            onChange={(event) => set({ ...ask, chat: event.currentTarget.value === "chat" })}
          >
            <option value="chat">a chat message</option>
            <option value="plain">plain text to go on with</option>
          </select>
        </label>
        <label>
          Tokens at most
          <input
            type="number"
            min={1}
            max={4096}
            value={ask.maxTokens}
            onInput={(event) => set({ ...ask, maxTokens: event.currentTarget.valueAsNumber || 1 })}
          />
        </label>
        <label>
          Temperature
          <input
            type="number"
            min={0}
            max={2}
            step={0.1}
            value={ask.temperature}
            onInput={(event) => set({ ...ask, temperature: event.currentTarget.valueAsNumber || 0 })}
          />
        </label>
        <button class="main" disabled={!canRun} title="Ctrl+Enter in the prompt">
          Run
        </button>
        <button type="button" disabled={!isRunning} onClick={stop}>
          Stop
        </button>
      </div>
    </form>
  );
}

function Add({ names, add }: { names: string[]; add: (...parts: string[]) => void }) {
  const [name, setName] = useState("");
  return (
    <form
      class="card add"
      aria-label="Add a column"
      onSubmit={(event) => {
        event.preventDefault();
        add(name);
        setName("");
      }}
    >
      <label>
        Adapter
        <input
          list="adapter-names"
          required
          placeholder={names[0] ?? "no adapter is stored"}
          value={name}
          onInput={(event) => setName(event.currentTarget.value)}
        />
      </label>
      <div class="actions">
        <button>Add a column</button>
        <button type="button" onClick={() => add()}>
          Add the base model
        </button>
      </div>
    </form>
  );
}
