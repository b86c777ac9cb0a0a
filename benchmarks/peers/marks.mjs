// What a peer's process is told, and what its jobs leave behind for the run: `marks.py` for Node.js.
import fs from "node:fs";
import path from "node:path";

const env = process.env;
export const DIRECTORY = env.PEERS_DIRECTORY ?? ".";
export const DATABASE_URL = env.PEERS_DATABASE_URL ?? "";
export const SOCKET = env.PEERS_SOCKET ?? "";
export const CONCURRENCY = Number(env.PEERS_CONCURRENCY ?? 100);
export const RECOVERY_S = Number(env.PEERS_RECOVERY_S ?? 0);
export const MODE = env.PEERS_MODE ?? "";
export const WORD = "word";
export const SLEEP_S = 0.2;

const JOBS = Number(env.PEERS_JOBS ?? 0);
const WARM_UP = 6;
const IDLE_S = 0.02;
const LONGEST_S = 20;
const CHUNK = 5000;

const opened = {};
const number = Buffer.alloc(8);
let runs = 0;

function file(name, flags) {
  return (opened[name] ??= fs.openSync(path.join(DIRECTORY, name), flags));
}

// Node.js has no shared memory with another program, so the count is written for the first, each 50th and the last.
export function ran() {
  runs += 1;
  if (runs === 1 || runs % 50 === 0 || runs >= JOBS) {
    number.writeBigInt64LE(BigInt(runs));
    fs.writeSync(file("runs", "r+"), number, 0, 8, 0);
  }
}

export function started(job) {
  const now = process.hrtime.bigint();
  fs.writeSync(file("starts", "a"), `${job} ${now}\n`);
}

export function ended(job) {
  fs.writeSync(file("ends", "a"), `${job}\n`);
}

export function sleep(seconds) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}

function startsNoted() {
  const starts = path.join(DIRECTORY, "starts");
  return fs.existsSync(starts) ? fs.readFileSync(starts, "utf8").split("\n").length - 1 : 0;
}

async function fill({ many }, task, count) {
  for (let first = 0; first < count; first += CHUNK) {
    const numbers = [];
    for (let job = first; job < Math.min(first + CHUNK, count); job += 1) numbers.push(job);
    await many(task, numbers);
  }
}

async function latency({ one }, count) {
  const until = performance.now() + 1000 * LONGEST_S;
  for (let job = -WARM_UP; job < count; job += 1) {
    await one("note_start", job);
    const returned = process.hrtime.bigint();
    fs.writeSync(file("returns", "a"), `${job} ${returned}\n`);
    while (startsNoted() < job + WARM_UP + 1) await sleep(0.002);
    await sleep(IDLE_S * (1 + 2 * Math.random()));
    if (job >= 0 && performance.now() > until) return;
  }
}

async function trickle({ one }) {
  for (let job = 0; ; job += 1) {
    await one("nothing", job);
    await sleep(1);
  }
}

// `worker` | `setup` | `fill TASK COUNT` | `latency COUNT` | `trickle`
export async function main({ worker, setup, producer }) {
  const [command, ...rest] = process.argv.slice(2);
  if (command === "worker") return worker();
  if (command === "setup") await setup?.();
  else {
    const sending = await producer();
    if (command === "fill") await fill(sending, rest[0], Number(rest[1]));
    else if (command === "latency") await latency(sending, Number(rest[0]));
    else if (command === "trickle") await trickle(sending);
    else throw new Error(`no command is called ${command}`);
    await sending.close();
  }
  process.exit(0);
}
