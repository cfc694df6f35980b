/**
 * The dedupe index in a local file, so that opening it costs one sequential read instead of one for every pack. A cache and
 * nothing else: it is checked as a whole, hits are verified anyway, and a file that is missing, foreign or damaged
 * only means that the index is built anew. Not part of the repository's format: numbers are in this machine's byte order.
 *
 * | offset | size | field |
 * | --- | --- | --- |
 * | 0 | 8 | magic `B2DEDUP1` |
 * | 8 | 4 | 01020304 in this machine's byte order |
 * | 12 | 4 | packs P |
 * | 16 | 16 | repository id |
 * | 32 | 4 | runs R |
 * | 36 | 4 | slots S |
 * | 40 | 4 | entries |
 * | 44 | 4 | zero |
 * | 48 | 32 | BLAKE3 (key of zeros) of the bytes before and of all that follows |
 * | 80 | 16 P | pack ids |
 * | | 8 P | sizes in bytes, as f64 |
 * | | 4 P | chunks |
 * | | 4 P | 1 for packs to be looked at, else 0 |
 * | | 8 R | runs |
 * | | 256 R | tags |
 * | | 128 R | checks |
 * | | 4 S | slots |
 */
import { constants } from 'node:fs';
import path from 'node:path';

import { errnoOf } from '../../errors.js';
import { DurableFile, mkdirDurable, readFully, systemFileCalls } from '../../fs.js';
import { keyedHash, type KeyedHash } from '../../hash.js';
import { PackFlag, PackTable } from './packs.js';
import { ChunkTable, RUN_CHUNKS } from './table.js';

const MAGIC = 'B2DEDUP1';
const HEADER_BYTES = 80;
const DIGEST_AT = 48;
const BYTE_ORDER = 0x0102_0304;

/** More room than what is in the file, so that a session's chunks can be taken in without copying everything. */
const SPARE_RUNS = 1024;
const SPARE_PACKS = 1024;

function hasher(): KeyedHash {
  return keyedHash(Buffer.alloc(32));
}

/** Little-endian and big-endian machines write different files; the marker tells them apart. */
function header(
  repositoryId: string,
  packs: number,
  runs: number,
  slots: number,
  entries: number,
): Buffer {
  const b = Buffer.alloc(HEADER_BYTES);
  b.write(MAGIC, 0, 'latin1');
  new Uint8Array(b.buffer, b.byteOffset, HEADER_BYTES).set(
    new Uint8Array(Uint32Array.of(BYTE_ORDER).buffer),
    8,
  );
  b.writeUInt32LE(packs, 12);
  b.write(repositoryId, 16, 'hex');
  b.writeUInt32LE(runs, 32);
  b.writeUInt32LE(slots, 36);
  b.writeUInt32LE(entries, 40);
  return b;
}

/** The memory of both tables in the order of the file, cut to what is used. */
function sections(
  packs: PackTable,
  table: ChunkTable,
  packCount: number,
  runCount: number,
): Buffer[] {
  const of = (memory: SharedArrayBuffer, bytes: number): Buffer => Buffer.from(memory, 0, bytes);
  return [
    of(packs.memory.ids, 16 * packCount),
    of(packs.memory.sizes, 8 * packCount),
    of(packs.memory.chunks, 4 * packCount),
    of(packs.memory.flags, 4 * packCount),
    of(table.memory.runs, 8 * runCount),
    of(table.memory.tags, 4 * RUN_CHUNKS * runCount),
    of(table.memory.checks, 2 * RUN_CHUNKS * runCount),
    of(table.memory.slots, table.memory.slots.byteLength),
  ];
}

/** Saves both tables, atomically, mode 0600. Only flag `sealed` is kept; packs with others are saved as not to be looked at. */
export async function saveDedupeCache(
  file: string,
  repositoryId: string,
  packs: PackTable,
  table: ChunkTable,
): Promise<void> {
  const packCount = packs.count;
  const runCount = table.runCount;
  const head = header(repositoryId, packCount, runCount, table.slots.length, table.entries);
  const parts = sections(packs, table, packCount, runCount);
  const flags = new Int32Array(packCount);
  for (let i = 0; i < packCount; i++) {
    const state = packs.flagsOf(i);
    flags[i] =
      (state & PackFlag.sealed) !== 0 && (state & PackFlag.unusable) === 0 ? PackFlag.sealed : 0;
  }
  parts[3] = Buffer.from(flags.buffer);
  hasher()
    .digest(head.subarray(0, DIGEST_AT), ...parts)
    .copy(head, DIGEST_AT);
  await mkdirDurable(path.dirname(file));
  const out = await DurableFile.begin(file, { mode: 0o600 });
  try {
    await out.write(head);
    for (const part of parts) await out.write(part);
    await out.commit();
  } finally {
    await out.abandon();
  }
}

/**
 * The tables that {@link saveDedupeCache} saved, with some room to grow; packs that were not to be looked at are `unusable`. Undefined if
 * there is no such file or anything about it is not right.
 */
export async function loadDedupeCache(
  file: string,
  repositoryId: string,
): Promise<{ readonly packs: PackTable; readonly table: ChunkTable } | undefined> {
  const calls = systemFileCalls;
  let fd: number;
  try {
    fd = await calls.open(file, constants.O_RDONLY | constants.O_NOFOLLOW);
  } catch {
    return undefined; // whatever the reason, it is only a cache
  }
  try {
    const found = await calls.fstat(fd);
    const head = Buffer.alloc(HEADER_BYTES);
    if ((await readFully(calls, fd, head, 0)) !== HEADER_BYTES) return undefined;
    const packCount = head.readUInt32LE(12);
    const runCount = head.readUInt32LE(32);
    const slotCount = head.readUInt32LE(36);
    const entries = head.readUInt32LE(40);
    const expected = header(repositoryId, packCount, runCount, slotCount, entries);
    if (!head.subarray(0, DIGEST_AT).equals(expected.subarray(0, DIGEST_AT))) return undefined;
    const size = HEADER_BYTES + 32 * packCount + (8 + 6 * RUN_CHUNKS) * runCount + 4 * slotCount;
    if (
      found.size !== size ||
      slotCount < 64 ||
      entries > runCount * RUN_CHUNKS ||
      entries > slotCount * 0.95
    ) {
      return undefined;
    }
    const packs = PackTable.create(packCount + SPARE_PACKS);
    const table = ChunkTable.withSlots(slotCount, Math.ceil(runCount * 1.1) + SPARE_RUNS);
    const parts = sections(packs, table, packCount, runCount);
    let at = HEADER_BYTES;
    for (const part of parts) {
      if ((await readFully(calls, fd, part, at)) !== part.length) return undefined;
      at += part.length;
    }
    const digest = hasher().digest(head.subarray(0, DIGEST_AT), ...parts);
    if (!digest.equals(head.subarray(DIGEST_AT))) return undefined;
    packs.restoreCount(packCount);
    for (let i = 0; i < packCount; i++)
      if (packs.flagsOf(i) !== PackFlag.sealed) packs.set(i, PackFlag.unusable);
    table.restoreState(runCount, entries);
    return { packs, table };
  } catch (error) {
    if (errnoOf(error) !== undefined) return undefined; // a disk that cannot read it: build it anew
    throw error;
  } finally {
    await calls.close(fd);
  }
}
