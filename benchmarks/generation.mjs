// Transformers.js as a contestant of generation.py: it reads a request a line, and answers a line.
//
//     node generation.mjs NPM_FOLDER MODEL_FOLDER DTYPE THREADS

import { createRequire } from "node:module";
import { basename, dirname, resolve } from "node:path";
import { createInterface } from "node:readline";

const [npm, model, dtype, threads] = process.argv.slice(2);
const require = createRequire(resolve(npm, "package.json"));
const { AutoModelForCausalLM, AutoTokenizer, env } = require("@huggingface/transformers");

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(model));
const name = basename(resolve(model));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const decoder = await AutoModelForCausalLM.from_pretrained(name, {
  dtype,
  device: "cpu",
  session_options: { intraOpNumThreads: Number(threads), interOpNumThreads: 1 },
});

async function write({ prompts, new: count }) {
  const started = performance.now();
  const inputs = await tokenizer(prompts, { padding: true });
  const found = await decoder.generate({ ...inputs, max_new_tokens: count, do_sample: false });
  tokenizer.batch_decode(found, { skip_special_tokens: true });
  const seconds = (performance.now() - started) / 1000;
  const width = inputs.input_ids.dims[1];
  const ids = found.tolist().map((row) => row.slice(width).map(Number));
  return { seconds, ids };
}

process.stdout.write(`${JSON.stringify({ about: `Transformers.js ${env.version}` })}\n`);
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(await write(JSON.parse(line)))}\n`);
}
