/** Raw writers whose every write is logged with its times (seqw.c), and the check of points against the definition. */
import { spawn, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { CaptureCommit, CaptureSink } from '../../src/capture/live-capture.js';
import { PointClass } from '../../src/format/commit.js';

const BLOCK = 4096;

const SOURCE = fileURLToPath(new URL('seqw.c', import.meta.url));

/** Compiles seqw.c to `program`, which it returns. */
export function compileWriters(program: string, source: string = SOURCE): string {
  const done = spawnSync('gcc', ['-O2', '-Wall', '-pthread', '-o', program, source], {
    encoding: 'utf8',
  });
  if (done.status !== 0) throw new Error(`gcc: ${done.stderr}`);
  return program;
}

export interface WriterLoad {
  readonly threads: number;
  readonly blocks: number;
  /** Mean pause of a thread between two writes. */
  readonly pauseUs: number;
  readonly seconds: number;
}

/** Starts the writers; resolves to the path of their log when they have ended. */
export function runWriters(
  program: string,
  device: string,
  load: WriterLoad,
  log: string,
): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(
      program,
      [device, load.threads, load.blocks, load.pauseUs, load.seconds, log].map(String),
      { stdio: ['ignore', 'ignore', 'inherit'] },
    );
    child.on('error', reject);
    child.on('exit', (code) =>
      code === 0 ? resolve(log) : reject(new Error(`seqw ended with ${code}`)),
    );
  });
}

interface Times {
  readonly issuedNs: bigint;
  readonly completedNs: bigint;
}

/** Block → version → times; version 0 is what was there before. */
export type WriteLog = ReadonlyMap<number, readonly (Times | undefined)[]>;

export function readWriteLog(path: string): { readonly log: WriteLog; readonly writes: number } {
  const bytes = readFileSync(path);
  const log = new Map<number, (Times | undefined)[]>();
  for (let at = 0; at + 24 <= bytes.length; at += 24) {
    const block = bytes.readUInt32LE(at);
    let versions = log.get(block);
    if (versions === undefined) log.set(block, (versions = []));
    versions[bytes.readUInt32LE(at + 4)] = {
      issuedNs: bytes.readBigUInt64LE(at + 8),
      completedNs: bytes.readBigUInt64LE(at + 16),
    };
  }
  return { log, writes: bytes.length / 24 };
}

/** The version a block holds; −1 where its sectors are of several (a write was under way). */
export function versionIn(bytes: Uint8Array): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset, BLOCK);
  const version = view.getUint32(0, true);
  for (let at = 512; at < BLOCK; at += 512) if (view.getUint32(at, true) !== version) return -1;
  return version;
}

/** The versions of all blocks at a point; `instantNs` on the monotonic clock (undefined: none was claimed). */
export interface VersionsAt {
  readonly instantNs: bigint | undefined;
  readonly versions: Int32Array;
}

export interface Verdict {
  points: number;
  /** States of no instant at all: a completed write is missing that was completed before another, present one was issued. */
  inconsistent: number;
  /** The state is of some instants, but not of the one claimed. */
  outside: number;
  torn: number;
}

/** Holds points against the log. A torn block counts as neither version: its write was under way. */
export function judge(points: readonly VersionsAt[], log: WriteLog): Verdict {
  const verdict: Verdict = { points: points.length, inconsistent: 0, outside: 0, torn: 0 };
  for (const point of points) {
    let lo = 0n;
    let hi = 1n << 63n;
    for (const [block, versions] of log) {
      const v = point.versions[block] ?? 0;
      if (v < 0) {
        verdict.torn++;
        continue;
      }
      const held = versions[v];
      if (held !== undefined && held.issuedNs > lo) lo = held.issuedNs;
      const next = versions[v + 1];
      if (next !== undefined && next.completedNs < hi) hi = next.completedNs;
    }
    if (lo > hi) verdict.inconsistent++;
    else if (point.instantNs !== undefined && (point.instantNs < lo || point.instantNs > hi))
      verdict.outside++;
  }
  return verdict;
}

/** A sink that keeps the newest content of every block, and of each point the version of every block the writers use. */
export class VersionSink implements CaptureSink {
  readonly image: Buffer;
  readonly points: { readonly seq: number; readonly versions: Int32Array }[] = [];
  private readonly versions: Int32Array;
  private seq = 0;

  constructor(sizeBytes: number, writerBlocks: number) {
    this.image = Buffer.alloc(sizeBytes);
    this.versions = new Int32Array(writerBlocks);
  }

  async commit(commit: CaptureCommit): Promise<{ seq: number; storedBytes: number }> {
    const { content } = commit;
    content.blocks.forEach((block, index) => {
      const bytes = content.bytesAt(index);
      bytes.copy(this.image, block * BLOCK);
      if (block < this.versions.length) this.versions[block] = versionIn(bytes);
    });
    this.seq++;
    if (commit.pointClass !== PointClass.none)
      this.points.push({ seq: this.seq, versions: this.versions.slice() });
    return { seq: this.seq, storedBytes: content.blocks.length * BLOCK };
  }
}
