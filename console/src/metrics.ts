/** Reads Prometheus' text format, and what the console shows of it. */

interface Sample {
  labels: Record<string, string>;
  value: number;
}
export type Metrics = Map<string, Sample[]>;

export function readMetrics(text: string): Metrics {
  const metrics: Metrics = new Map();
  for (const line of text.split("\n")) {
    const parts = /^([\w:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (parts === null) continue;
    const [, name = "", labels = "", value = ""] = parts;
    const sample: Sample = { labels: {}, value: value === "+Inf" ? Infinity : Number(value) };
    for (const [, label = "", text = ""] of labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      sample.labels[label] = text.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
    }
    metrics.set(name, [...(metrics.get(name) ?? []), sample]);
  }
  return metrics;
}

/** The sum of a metric's samples; 0 where there is none. */
export function total(metrics: Metrics, name: string): number {
  return (metrics.get(name) ?? []).reduce((sum, sample) => sum + sample.value, 0);
}

/** The sums of a metric by one of its labels. */
export function labelled(metrics: Metrics, name: string, label: string): Map<string, number> {
  const sums = new Map<string, number>();
  for (const { labels, value } of metrics.get(name) ?? []) {
    const of = labels[label] ?? "";
    sums.set(of, (sums.get(of) ?? 0) + value);
  }
  return sums;
}

/** The value below which a share of a histogram's observations lie; null where there are none. */
export function quantile(metrics: Metrics, name: string, share: number): number | null {
  const sums = labelled(metrics, `${name}_bucket`, "le");
  const buckets = [...sums]
    .map(([bound, count]) => ({ bound: bound === "+Inf" ? Infinity : Number(bound), count }))
    .sort((one, other) => one.bound - other.bound);
  const wanted = share * (buckets.at(-1)?.count ?? 0);
  if (wanted === 0) return null;
  let [below, before] = [0, 0];
  for (const { bound, count } of buckets) {
    if (count >= wanted) {
      if (bound === Infinity) return below;
      return below + (bound - below) * ((wanted - before) / (count - before));
    }
    [below, before] = [bound, count];
  }
  return below;
}
