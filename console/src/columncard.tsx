/** One column of the comparison: its adapters with their weights, and its answer. */

import { useState } from "preact/hooks";
import { type Answer, type Column, type Composition, titleOf } from "./column";
import { Problem } from "./parts";
import { Tokens } from "./tokens";

interface CardProps {
  column: Column;
  names: string[];
  answer: Answer | undefined;
  change: (column: Column) => void;
  sweep: () => void;
  remove: () => void;
}

export function ColumnCard({ column, names, answer, change, sweep, remove }: CardProps) {
  const { parts } = column;
  const title = titleOf(column);
  const id = `column-${column.id}`;
  function weigh(index: number, weight: number) {
    change({ ...column, parts: parts.map((part, at) => (at === index ? { ...part, weight } : part)) });
  }
  function leaveOut(index: number) {
    change({ ...column, parts: parts.filter((_, at) => at !== index) });
  }
  return (
    <section class="card" aria-labelledby={id}>
      <div class="head">
        <h2 id={id}>{title}</h2>
        <button type="button" class="quiet" aria-label={`Remove ${title}`} onClick={remove}>
          ×
        </button>
      </div>
      {parts.map((part, index) => (
        <Weight
          key={part.name}
          id={`${id}-weight-${index}`}
          name={part.name}
          weight={part.weight}
          set={(weight) => weigh(index, weight)}
          leaveOut={parts.length > 1 ? () => leaveOut(index) : undefined}
        />
      ))}
      {parts.length > 1 && (
        <label class="line">
          Mixed as
          <select
            value={column.composition}
            onChange={(event) =>
              change({ ...column, composition: event.currentTarget.value as Composition })
            }
          >
            <option value="product">product</option>
            <option value="linear">linear</option>
          </select>
        </label>
      )}
      <Mix
        names={names.filter((name) => !parts.some((part) => part.name === name))}
        add={(name) => change({ ...column, parts: [...parts, { name, weight: 1 }] })}
      />
      {parts.length > 0 && (
        <button type="button" onClick={sweep} title="Replaces all columns by eight strengths of it">
          Sweep the strength
        </button>
      )}
      {answer && (
        <div class="answer" aria-busy={answer.state === "running"}>
          <Tokens id={id} label={title} answer={answer} />
          <Problem error={answer.error} />
          <p class="note">{told(answer)}</p>
        </div>
      )}
    </section>
  );
}

function told(answer: Answer): string {
  const count = `${answer.tokens.length} tokens`;
  const words = {
    running: `${count} so far`,
    done: answer.finish === "length" ? `${count}, then the limit` : `${count}, then it ended`,
    stopped: `${count}, then stopped`,
    failed: count,
  };
  return words[answer.state];
}

interface WeightProps {
  id: string;
  name: string;
  weight: number;
  set: (weight: number) => void;
  leaveOut?: () => void;
}

function Weight({ id, name, weight, set, leaveOut }: WeightProps) {
  return (
    <div class="weight">
      <label for={id}>Weight of {name}</label>
      {leaveOut && (
        <button type="button" class="quiet" aria-label={`Leave ${name} out`} onClick={leaveOut}>
          ×
        </button>
      )}
      <input
        id={id}
        type="range"
        min={-2}
        max={3}
        step={0.05}
        value={weight}
        onInput={(event) => set(event.currentTarget.valueAsNumber)}
      />
      <output for={id}>{weight.toFixed(2)}</output>
    </div>
  );
}

function Mix({ names, add }: { names: string[]; add: (name: string) => void }) {
  const [name, setName] = useState("");
  return (
    <form
      class="line"
      onSubmit={(event) => {
        event.preventDefault();
        if (!names.includes(name)) return;
        add(name);
        setName("");
      }}
    >
      <label>
        <span class="hidden">Adapter to mix in</span>
        <input
          list="adapter-names"
          placeholder="Mix in an adapter"
          value={name}
          onInput={(event) => setName(event.currentTarget.value)}
        />
      </label>
      <button disabled={!names.includes(name)}>Mix in</button>
    </form>
  );
}
