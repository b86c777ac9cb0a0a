// BullMQ. Settings: "Workers > Concurrency", "Workers > Auto-removal of jobs", "Queues > Adding jobs in bulk" and
// "Workers > Stalled Jobs" of its documentation.
import { createRequire } from "node:module";
import * as marks from "./marks.mjs";

const { Queue, Worker } = createRequire(`${process.env.PEERS_ENVIRONMENT}/`)("bullmq");

const connection = { path: marks.SOCKET, maxRetriesPerRequest: null };
const recovery = marks.RECOVERY_S
  ? { lockDuration: 1000 * marks.RECOVERY_S, stalledInterval: 1000 * marks.RECOVERY_S }
  : {};

const TASKS = {
  nothing: async () => marks.ran(),
  note_start: async ({ number }) => marks.started(number),
  sleep: async ({ number }) => {
    await marks.sleep(marks.SLEEP_S);
    marks.ended(number);
  },
};

function worker() {
  new Worker("jobs", (job) => TASKS[job.name](job.data), {
    connection,
    concurrency: marks.CONCURRENCY,
    removeOnComplete: { count: 0 },
    ...recovery,
  });
}

function data(number) {
  return { number, word: marks.WORD };
}

async function producer() {
  const queue = new Queue("jobs", { connection });
  return {
    one: (task, number) => queue.add(task, data(number)),
    many: (task, numbers) => queue.addBulk(numbers.map((number) => ({ name: task, data: data(number) }))),
    close: () => queue.close(),
  };
}

await marks.main({ worker, producer });
