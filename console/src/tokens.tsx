/** An answer as its tokens, each with its probability. */

import { useState } from "preact/hooks";
import type { Answer, Token } from "./column";

/** Four steps of how sure the model was: likely tokens are plain, unlikely ones stand out. */
function sureness(token: Token): number {
  const probability = Math.exp(token.logprob);
  return [0.9, 0.6, 0.3].filter((step) => probability < step).length;
}

function percent(logprob: number): string {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "under 0.1 %" : `${share.toFixed(1)} %`;
}

/** A token as it can be read alone. */
function shown(text: string): string {
  return text.replace(/\n/g, "⏎").replace(/ /g, "␣") || "(empty)";
}

interface TokensProps {
  id: string;
  label: string;
  answer: Answer;
}

export function Tokens({ id, label, answer }: TokensProps) {
  const { tokens } = answer;
  const [at, setAt] = useState<number | null>(null);
  const token = at === null ? undefined : tokens[at];
  const last = tokens.length - 1;
  function move(event: KeyboardEvent) {
    const from = at ?? -1;
    const goes: Record<string, number | null> = {
      ArrowRight: Math.min(from + 1, last),
      ArrowDown: Math.min(from + 1, last),
      ArrowLeft: Math.max(from - 1, 0),
      ArrowUp: Math.max(from - 1, 0),
      Home: 0,
      End: last,
      Escape: null,
    };
    const to = goes[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setAt(to);
  }
  if (tokens.length === 0) return null;
  return (
    <>
      <div
        class="tokens"
        role="listbox"
        aria-label={`${label}: the answer's tokens`}
        aria-activedescendant={at === null ? undefined : `${id}-${at}`}
        tabIndex={0}
        onKeyDown={move}
        onMouseLeave={() => setAt(null)}
      >
        {tokens.map((each, index) => (
          <span
            key={index}
            id={`${id}-${index}`}
            role="option"
            aria-selected={index === at}
            class={`token sure-${sureness(each)}`}
            aria-label={`${shown(each.text)}, ${percent(each.logprob)}`}
            onMouseEnter={() => setAt(index)}
          >
            {each.text}
          </span>
        ))}
      </div>
      <div class="top" role="status">
        {token === undefined ? (
          <p class="note">Point at a token, or use the arrow keys, for its probabilities.</p>
        ) : (
          <Top token={token} />
        )}
      </div>
    </>
  );
}

function Top({ token }: { token: Token }) {
  const isTop = token.top.some((each) => each.text === token.text);
  return (
    <ol>
      {[...(isTop ? [] : [token]), ...token.top].map((each) => (
        <li key={each.text} class={each.text === token.text ? "taken" : undefined}>
          <code>{shown(each.text)}</code>
          <span class="share" style={{ width: `${100 * Math.exp(each.logprob)}%` }} />
          <span>{percent(each.logprob)}</span>
        </li>
      ))}
    </ol>
  );
}
