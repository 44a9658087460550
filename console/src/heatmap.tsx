/** Heat maps of vectors: a map for each kind of module, a line for each layer. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Module } from "./answers";

const LINE = 10;

interface Colours {
  amplify: number[];
  inhibit: number[];
}

/** The numbers of the two colours that the style gives this element. */
function coloursOf(element: Element): Colours {
  const style = getComputedStyle(element);
  const numbers = (name: string) => style.getPropertyValue(name).split(",").map(Number);
  return { amplify: numbers("--amplify"), inhibit: numbers("--inhibit") };
}

/** The largest mean of a few features, which has the strongest colour. */
export function reachOf(modules: Module[]): number {
  return Math.max(1e-9, ...modules.flatMap((each) => each.columns.map(Math.abs)));
}

export function HeatMaps({ modules }: { modules: Module[] }) {
  const reach = reachOf(modules);
  const groups = new Map<string, Module[]>();
  for (const each of modules) {
    const group = `${each.kind}, ${each.side}`;
    groups.set(group, [...(groups.get(group) ?? []), each]);
  }
  return (
    <>
      <ul class="legend">
        <li>
          <span class="swatch inhibit" /> inhibited, to {(1 - reach).toFixed(2)}
        </li>
        <li>
          <span class="swatch" /> as the base
        </li>
        <li>
          <span class="swatch amplify" /> amplified, to {(1 + reach).toFixed(2)}
        </li>
      </ul>
      <div class="maps">
        {[...groups].map(([group, of]) => (
          <HeatMap key={group} name={group} modules={of} reach={reach} />
        ))}
      </div>
    </>
  );
}

interface MapProps {
  name: string;
  modules: Module[];
  reach: number;
}

function HeatMap({ name, modules, reach }: MapProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<{ line: number; column: number } | null>(null);
  const width = Math.max(...modules.map((each) => each.columns.length));
  useEffect(() => {
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const paint = () => draw(canvas.current!, modules, reach);
    paint();
    scheme.addEventListener("change", paint);
    return () => scheme.removeEventListener("change", paint);
  }, [modules, reach]);
  return (
    <figure class="map">
      <figcaption>
        <code>{name}</code>
      </figcaption>
      <canvas
        ref={canvas}
        role="img"
        aria-label={`${name}: ${summary(modules)}`}
        width={width}
        height={modules.length}
        style={{ height: `${modules.length * LINE}px` }}
        onMouseLeave={() => setAt(null)}
        onMouseMove={(event) => {
          const box = event.currentTarget.getBoundingClientRect();
          setAt({
            line: Math.floor(((event.clientY - box.top) / box.height) * modules.length),
            column: Math.floor(((event.clientX - box.left) / box.width) * width),
          });
        }}
      />
      <p class="note">{at ? under(modules, at.line, at.column) : summary(modules)}</p>
    </figure>
  );
}

/** A pixel for each value; the style stretches them. */
function draw(canvas: HTMLCanvasElement, modules: Module[], reach: number) {
  const context = canvas.getContext("2d")!;
  const { amplify, inhibit } = coloursOf(canvas);
  const image = context.createImageData(canvas.width, canvas.height);
  modules.forEach(({ columns }, line) => {
    for (let x = 0; x < canvas.width; x++) {
      const value = columns[Math.floor((x * columns.length) / canvas.width)] ?? 0;
      const [red = 0, green = 0, blue = 0] = value > 0 ? amplify : inhibit;
      // The square root shows small changes beside large ones.
      const alpha = 255 * Math.sqrt(Math.abs(value) / reach);
      image.data.set([red, green, blue, alpha], 4 * (line * canvas.width + x));
    }
  });
  context.putImageData(image, 0, 0);
}

function summary(modules: Module[]): string {
  const [most, least] = ["amplified" as const, "inhibited" as const].map((which) => {
    const size = modules.reduce((sum, each) => sum + each.size, 0);
    const count = modules.reduce((sum, each) => sum + each[which] * each.size, 0);
    return `${Math.round((100 * count) / size)} % ${which}`;
  });
  const layers = modules.length === 1 ? "1 layer" : `${modules.length} layers`;
  return `${layers}, ${most}, ${least}`;
}

function under(modules: Module[], line: number, column: number): string {
  const module = modules[line];
  const value = module?.columns[column];
  if (module === undefined || value === undefined) return "";
  const width = module.size / module.columns.length;
  const [from, to] = [Math.round(column * width), Math.round((column + 1) * width) - 1];
  const features = from < to ? `features ${from} to ${to}` : `feature ${from}`;
  return `layer ${module.layer ?? "none"}, ${features}: times ${(1 + value).toFixed(3)}`;
}
