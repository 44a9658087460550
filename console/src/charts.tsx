/** The two charts of an adapter's vectors. */

import type { Module } from "./answers";

const WIDTH = 480;
const HEIGHT = 160;
const BELOW = 18;

export function Histogram({ bounds, modules }: { bounds: number[]; modules: Module[] }) {
  const counts = bounds
    .slice(1)
    .map((_, bin) => modules.reduce((sum, each) => sum + (each.histogram[bin] ?? 0), 0));
  const most = Math.max(1, ...counts);
  const wide = WIDTH / counts.length;
  const [low = 0, high = 0] = [bounds[0], bounds.at(-1)];
  const all = counts.reduce((sum, count) => sum + count, 0);
  return (
    <svg
      class="chart"
      viewBox={`0 0 ${WIDTH} ${HEIGHT + BELOW}`}
      role="img"
      aria-label={`${all} factors between ${low.toFixed(2)} and ${high.toFixed(2)}`}
    >
      {counts.map((count, bin) => (
        <rect
          key={bin}
          class={bin < counts.length / 2 ? "inhibit" : "amplify"}
          x={bin * wide + 0.5}
          width={wide - 1}
          y={HEIGHT - (HEIGHT * count) / most}
          height={(HEIGHT * count) / most}
        >
          <title>{`${bounds[bin]?.toFixed(3)} to ${bounds[bin + 1]?.toFixed(3)}: ${count}`}</title>
        </rect>
      ))}
      <line x1={0} x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />
      <text x={0} y={HEIGHT + BELOW - 3}>
        {low.toFixed(2)}
      </text>
      <text x={WIDTH / 2} y={HEIGHT + BELOW - 3} text-anchor="middle">
        1
      </text>
      <text x={WIDTH} y={HEIGHT + BELOW - 3} text-anchor="end">
        {high.toFixed(2)}
      </text>
    </svg>
  );
}

/** A line for each kind of module; each point is the length of what a layer's vector changes. */
export function NormByLayer({ modules }: { modules: Module[] }) {
  const lines = new Map<string, Module[]>();
  for (const each of modules) {
    const name = `${each.kind}, ${each.side}`;
    lines.set(name, [...(lines.get(name) ?? []), each]);
  }
  const most = Math.max(1e-9, ...modules.map((each) => each.norm));
  const layers = Math.max(1, ...modules.map((each) => each.layer ?? 0));
  const x = (layer: number | null) => 4 + ((layer ?? 0) / layers) * (WIDTH - 8);
  const y = (norm: number) => HEIGHT - 4 - (norm / most) * (HEIGHT - 16);
  return (
    <>
      <svg
        class="chart"
        viewBox={`0 0 ${WIDTH} ${HEIGHT + BELOW}`}
        role="img"
        aria-label={`The largest norm is ${most.toFixed(2)}`}
      >
        <line x1={0} x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />
        {[...lines].map(([name, each], line) => (
          <g key={name} class={`series-${line % 6}`}>
            <polyline points={each.map((one) => `${x(one.layer)},${y(one.norm)}`).join(" ")} />
            {each.map((one) => (
              <circle key={one.module} cx={x(one.layer)} cy={y(one.norm)} r={3}>
                <title>{`${one.module}: ${one.norm.toFixed(3)}`}</title>
              </circle>
            ))}
          </g>
        ))}
        <text x={0} y={HEIGHT + BELOW - 3}>
          layer 0
        </text>
        <text x={WIDTH} y={HEIGHT + BELOW - 3} text-anchor="end">
          layer {layers}
        </text>
        <text x={WIDTH} y={10} text-anchor="end">
          {most.toFixed(2)}
        </text>
      </svg>
      <ul class="key">
        {[...lines.keys()].map((name, line) => (
          <li key={name} class={`series-${line % 6}`}>
            {name}
          </li>
        ))}
      </ul>
    </>
  );
}
