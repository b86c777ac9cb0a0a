// graphile-worker, plain or with its local queue and batched completion ("Performance" of its documentation).
import { createRequire } from "node:module";
import * as marks from "./marks.mjs";

const require = createRequire(`${process.env.PEERS_ENVIRONMENT}/`);
const { Logger, makeWorkerUtils, run, runMigrations } = require("graphile-worker");
const { Pool } = require("pg");

const location = new URL(marks.DATABASE_URL.replace("@/", "@localhost/"));
const concurrentJobs = marks.CONCURRENCY;
const maxPoolSize = Math.min(concurrentJobs, 24) + 1;
const pgPool = new Pool({
  host: location.searchParams.get("host"),
  database: location.pathname.slice(1),
  user: location.username,
  max: maxPoolSize,
});
pgPool.on("error", () => {});

const batching =
  marks.MODE === "batch" ? { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } : {};
const logger = new Logger(() => (level, message) => level === "error" && console.error(message));
const preset = { worker: { concurrentJobs, maxPoolSize, ...batching } };

const taskList = {
  nothing: async () => marks.ran(),
  note_start: async ({ number }) => marks.started(number),
  sleep: async ({ number }) => {
    await marks.sleep(marks.SLEEP_S);
    marks.ended(number);
  },
};

function data(number) {
  return { number, word: marks.WORD };
}

async function producer() {
  const utils = await makeWorkerUtils({ pgPool, logger });
  return {
    one: (task, number) => utils.addJob(task, data(number)),
    many: (task, numbers) =>
      utils.addJobs(numbers.map((number) => ({ identifier: task, payload: data(number) }))),
    close: () => utils.release(),
  };
}

await marks.main({
  worker: () => run({ preset, pgPool, taskList, logger }),
  setup: () => runMigrations({ pgPool, logger }),
  producer,
});
