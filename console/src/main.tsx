/** The shell: which page is shown, and the question for a key. */

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { AdaptersPage } from "./adapters";
import { askWith, forgetKey, keyState, onKeyChange } from "./api";
import { ComparePage } from "./compare";
import { LookPage } from "./look";
import { ServePage } from "./serve";

const PAGES = {
  adapters: { title: "Adapters", show: AdaptersPage },
  compare: { title: "Compare", show: ComparePage },
  look: { title: "Look inside", show: LookPage },
  serve: { title: "Serve", show: ServePage },
};
type Name = keyof typeof PAGES;

/** The page and what it shows, from `#/adapters/support-de`. */
function place(): { name: Name; of: string } {
  const [name = "", ...rest] = location.hash.replace(/^#\//, "").split("/");
  return { name: name in PAGES ? (name as Name) : "adapters", of: decodeURIComponent(rest.join("/")) };
}

function Console() {
  const [{ name, of }, setPlace] = useState(place);
  const [key, setKey] = useState(keyState);
  const main = useRef<HTMLElement>(null);
  const { title, show: Shown } = PAGES[name];
  const first = useRef(true);
  useEffect(() => {
    const moved = () => setPlace(place());
    addEventListener("hashchange", moved);
    const forget = onKeyChange(() => setKey(keyState()));
    return () => {
      removeEventListener("hashchange", moved);
      forget();
    };
  }, []);
  useEffect(() => {
    document.title = `${title} – Infuse`;
    // Who follows a link with the keyboard goes on at the page, not behind the link.
    if (!first.current) main.current?.focus();
    first.current = false;
  }, [name]);
  return (
    <>
      <header class="bar">
        <a class="brand" href="#/adapters">
          <img src="console/icon.svg" alt="" width={22} height={22} /> Infuse
        </a>
        <nav aria-label="Pages">
          {Object.entries(PAGES).map(([each, page]) => (
            <a key={each} href={`#/${each}`} aria-current={each === name ? "page" : undefined}>
              {page.title}
            </a>
          ))}
        </nav>
        {key !== "unneeded" && (
          <button type="button" class="quiet" onClick={forgetKey}>
            {key === "given" ? "Forget the key" : "Give a key"}
          </button>
        )}
      </header>
      <main ref={main} tabIndex={-1} aria-label={title}>
        <Shown of={of} />
      </main>
      <KeyDialog />
    </>
  );
}

/** Asks for a key where the server wants one. It is kept in this page's memory only. */
function KeyDialog() {
  const dialog = useRef<HTMLDialogElement>(null);
  const field = useRef<HTMLInputElement>(null);
  const answer = useRef<(key: string | null) => void>(() => undefined);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    askWith((because) => {
      setProblem(because);
      dialog.current!.showModal();
      return new Promise((resolve) => (answer.current = resolve));
    });
  }, []);
  function close() {
    const given = dialog.current!.returnValue === "use" ? field.current!.value.trim() : "";
    field.current!.value = "";
    dialog.current!.returnValue = "";
    answer.current(given || null);
  }
  return (
    <dialog ref={dialog} aria-labelledby="key-title" onClose={close}>
      <form method="dialog">
        <h2 id="key-title">This server wants a key</h2>
        <p>The key stays in this page's memory, and is gone when the page is closed.</p>
        {problem && (
          <p class="problem" role="alert">
            {problem}
          </p>
        )}
        <label>
          Key
          <input ref={field} type="password" autocomplete="off" required />
        </label>
        <div class="actions">
          <button value="use" class="main">
            Use the key
          </button>
          <button value="" formNoValidate class="quiet">
            Go on without
          </button>
        </div>
      </form>
    </dialog>
  );
}

render(<Console />, document.body);
