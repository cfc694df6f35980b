/**
 * The dedupe index of 1 TiB of unique chunks of 64 KiB: memory, and time to build, open and look up.
 *
 *   npx tsc -p bench && node node_modules/.cache/b2/bench/bench/dedupe.js [--chunks N]
 *
 * The packs are made up: a store hands out footers, sealed as real ones are, of 932 chunks each (32 MiB as the realistic image of the
 * benchmark compresses). One process reads all footers and saves the local copy; another opens that copy and looks up chunks. Ends
 * with 1 if the index takes more than 256 MiB per 2^24 chunks, counted by itself or as growth of the process.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { encodeFooter, type FooterFrame } from '../src/format/pack.js';
import { packIdOf, packName } from '../src/format/names.js';
import { keyRing } from '../src/format/seal.js';
import { lz4 } from '../src/lz4.js';
import { DedupeIndex } from '../src/repo/dedupe/index.js';
import { Found } from '../src/repo/dedupe/view.js';
import type { PackReadContext } from '../src/repo/pack-reader.js';
import type { ObjectReader, Store } from '../src/repo/store.js';

const MIB = 1024 * 1024;
const TIB_CHUNKS = 2 ** 24;
const LIMIT_MIB = 256;
const CHUNKS_PER_PACK = 932;
const PACK_BYTES = 32 * MIB;
const FOOTER_AT = PACK_BYTES - 60_000;

/** The id of chunk `n`, eight words into `into` from `at` on. */
function fillId(n: number, into: Uint32Array, at: number): void {
  let h = Math.imul(n, 0x9e37_79b1) ^ (n / 0x1_0000_0000);
  for (let i = 0; i < 8; i++) {
    h = Math.imul(h ^ (h >>> 16) ^ i, 0x85eb_ca6b);
    h = Math.imul(h ^ (h >>> 13) ^ n, 0xc2b2_ae35);
    into[at + i] = h ^ (h >>> 16);
  }
}

const packIdFor = (n: number): string =>
  Buffer.from([n, n >> 8, n >> 16])
    .toString('hex')
    .padEnd(32, '5');
const numberOf = (packId: string): number =>
  Buffer.from(packId.slice(0, 6), 'hex').readUIntLE(0, 3);

const refuse = (): Promise<never> => Promise.reject(new Error('not made up'));

/** A store of `packs` packs of which only the ends exist. */
class MadeUpStore implements Store {
  readonly url = 'made-up:';
  readonly canAppend = false;
  readonly keys = keyRing(Buffer.alloc(32, 1), true);
  opens = 0;
  private readonly packs: number;
  private readonly sizeBytes: number;

  constructor(packs: number) {
    this.packs = packs;
    this.sizeBytes = FOOTER_AT + this.tail(0).length;
  }

  private tail(pack: number): Buffer {
    const ids = new Uint32Array(CHUNKS_PER_PACK * 8);
    const frames: FooterFrame[] = [];
    for (let i = 0; i < CHUNKS_PER_PACK; i++) {
      fillId(pack * CHUNKS_PER_PACK + i, ids, i * 8);
      frames.push({
        number: i,
        offset: i,
        storedBytes: 36_000,
        plainBytes: 65_536,
        type: 1,
        compression: 1,
        count: 1,
      });
    }
    const footer = {
      frames,
      ids: Buffer.from(ids.buffer),
      lengths: new Uint32Array(CHUNKS_PER_PACK).fill(65_536),
    };
    return encodeFooter(footer, packIdFor(pack), FOOTER_AT, Buffer.alloc(16, pack), this.keys);
  }

  async open(name: string): Promise<ObjectReader> {
    this.opens++;
    const tail = this.tail(numberOf(packIdOf(name) ?? ''));
    const { sizeBytes } = this;
    return {
      sizeBytes,
      read: async (into, offset) => {
        const skip = Math.max(0, FOOTER_AT - offset);
        return skip + tail.copy(into, skip, Math.max(0, offset - FOOTER_AT));
      },
      close: () => Promise.resolve(),
    };
  }

  async *list(): AsyncIterable<{ name: string; sizeBytes: number; modifiedMs: number }> {
    for (let n = 0; n < this.packs; n++)
      yield { name: packName(packIdFor(n)), sizeBytes: this.sizeBytes, modifiedMs: 0 };
  }

  put = refuse;
  putStream = refuse;
  get = refuse;
  stat = refuse;
  delete = refuse;
  openAppend = refuse;
  space = refuse;
  close = (): Promise<void> => Promise.resolve();
}

function seconds(since: bigint): number {
  return Number(process.hrtime.bigint() - since) / 1e9;
}

async function measure(step: string, chunks: number, cacheFile: string): Promise<void> {
  const packs = Math.ceil(chunks / CHUNKS_PER_PACK);
  const store = new MadeUpStore(packs);
  const ctx: PackReadContext = {
    store,
    keys: store.keys,
    lz4: lz4(),
    repositoryId: 'be'.repeat(16),
  };
  const before = process.memoryUsage().rss;
  let start = process.hrtime.bigint();
  const index = await DedupeIndex.open({ ctx, cacheFile });
  const line: Record<string, number | string> = {
    step,
    chunks: index.chunkCount,
    openSeconds: seconds(start),
    indexMiB: index.memoryBytes / MIB,
    bytesPerChunk: index.memoryBytes / index.chunkCount,
  };
  if (step === 'build') {
    start = process.hrtime.bigint();
    await index.save();
    line['saveSeconds'] = seconds(start);
    line['fileMiB'] = statSync(cacheFile).size / MIB;
  } else {
    const grown = process.memoryUsage().rss - before;
    line['grownMiB'] = grown / MIB;
    const view = index.view();
    const id = new Uint32Array(8);
    const bytes = Buffer.from(id.buffer);
    const misses = 2_000_000;
    start = process.hrtime.bigint();
    for (let i = 0; i < misses; i++) {
      fillId(packs * CHUNKS_PER_PACK + i, id, 0);
      if (view.find(bytes) === Found.hit) throw new Error('a chunk was found that is not there');
    }
    line['missesPerSecond'] = misses / seconds(start);
    const hits = Math.min(2_000_000, index.chunkCount);
    const first = Math.floor((index.chunkCount - hits) / 2);
    start = process.hrtime.bigint();
    for (let i = 0; i < hits; i++) {
      fillId(first + i, id, 0);
      let found = view.find(bytes);
      if (found === Found.needsFooter) {
        await view.loadFooter();
        found = view.find(bytes);
      }
      if (found !== Found.hit) throw new Error(`chunk ${first + i} was not found`);
    }
    line['hitsPerSecond'] = hits / seconds(start);
    line['footersRead'] = store.opens;
    const limit = (LIMIT_MIB * MIB * Math.max(index.chunkCount, 2 ** 20)) / TIB_CHUNKS;
    if (index.memoryBytes > limit || grown > limit + 16 * MIB) process.exitCode = 1;
  }
  for (const [key, value] of Object.entries(line))
    if (typeof value === 'number') line[key] = Math.round(value * 100) / 100;
  console.log(JSON.stringify(line));
}

const { values } = parseArgs({
  options: {
    chunks: { type: 'string', default: String(TIB_CHUNKS) },
    step: { type: 'string' },
    cache: { type: 'string', default: '' },
  },
});
if (values.step !== undefined) {
  await measure(values.step, Number(values.chunks), values.cache);
} else {
  const dir = mkdtempSync(path.join(tmpdir(), 'b2-bench-dedupe-'));
  try {
    for (const step of ['build', 'use']) {
      const args = ['--step', step, '--chunks', values.chunks, '--cache', path.join(dir, 'index')];
      const ran = spawnSync(process.execPath, [fileURLToPath(import.meta.url), ...args], {
        stdio: 'inherit',
      });
      if (ran.status !== 0) process.exitCode = 1;
    }
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}
