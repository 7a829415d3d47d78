// Run pipelines of Transformers.js; see make_tasks.py and make_generators.py, which start it.
//
//     node transformers_js.mjs PACKAGES JOBS RESULTS
//
// PACKAGES is the folder that `npm i @huggingface/transformers` was run in. JOBS is a JSON file,
// {"models": folder, "jobs": [{"model": name in it, "task": ..., "calls": {name: [arguments]},
// "options": of `pipeline`, or none}]};
// RESULTS is written: {"version": ..., "answers": [for each job {name: answer or {"error": why}}]}.

import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [packages, jobsFile, resultsFile] = process.argv.slice(2);
const require = createRequire(path.resolve(packages, "none.js"));
const { env, pipeline } = await import(
  pathToFileURL(require.resolve("@huggingface/transformers")).href
);

const { models, jobs } = JSON.parse(readFileSync(jobsFile, "utf-8"));
env.allowRemoteModels = false;
env.localModelPath = models;
env.useFSCache = false;

const answers = [];
for (const { model, task, calls, options: more } of jobs) {
  const found = {};
  const options = {
    ...more,
    dtype: "fp32",
    device: "cpu",
    session_options: { intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 3 },
  };
  let pipe = null;
  try {
    pipe = await pipeline(task, model, options);
  } catch (error) {
    found["*"] = { error: String(error.message) };
  }
  for (const [name, given] of pipe ? Object.entries(calls) : []) {
    try {
      found[name] = await pipe(...given);
    } catch (error) {
      found[name] = { error: String(error.message) };
    }
  }
  await pipe?.dispose();
  answers.push(found);
}
writeFileSync(resultsFile, JSON.stringify({ version: env.version, answers }));
