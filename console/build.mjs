// Builds the console into server/console, and notes which sources it was built from.
import { createHash } from "node:crypto";
import { copyFileSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const INTO = "../server/console";

await build({
  entryPoints: { console: "src/main.tsx", style: "src/style.css" },
  outdir: INTO,
  bundle: true,
  minify: true,
  jsx: "automatic",
  jsxImportSource: "preact",
  target: "es2023",
  legalComments: "none",
});
for (const file of ["index.html", "icon.svg"]) copyFileSync(`src/${file}`, `${INTO}/${file}`);

// tests/console/test_built.py computes the same.
const sources = ["package-lock.json", ...readdirSync("src").map((file) => `src/${file}`)].sort();
const digest = createHash("sha256");
for (const file of sources) digest.update(`${file}\0`).update(readFileSync(file)).update("\0");
writeFileSync(`${INTO}/built-from.txt`, `${digest.digest("hex")}\n`);
