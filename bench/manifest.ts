/**
 * Opening an image of 1 TiB written in a million commits: time to the first byte's place, and memory.
 *
 *   npx tsc -p bench && node node_modules/.cache/b2/bench/bench/manifest.js [--dir DIR] [--samples N] [--commits N] [--keep]
 *
 * Builds the manifest that a volume of 1 TiB has after 1,048,544 commits of 16 random extents of 64 KiB each, as the packs of 32 MiB and
 * the policy of src/repo/segments/maintain.ts leave it, with as many segments as there can be at a time; encrypted. (The
 * segments are written at their final level right away, which gives the same segments as merging and takes a fifth of the time.) Then, each
 * in a process of its own and with none of its files in the page cache: open the image at a random time and find a
 * random block. Ends with 1 if a process needed more than 256 MiB. With --dir and --keep a second run measures again without building.
 *
 * `--repository DIR` only makes a whole repository of such a volume, for the programs that read one (bench/access.mjs).
 */
import { spawnSync } from 'node:child_process';
import { createHash, randomBytes, randomInt } from 'node:crypto';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import type { SegmentName } from '../src/format/names.js';
import type { KeyRing } from '../src/format/seal.js';
import type { PageCache } from '../src/repo/segments/page-cache.js';
import type { Store } from '../src/repo/store.js';
import type { SegmentReader } from '../src/repo/segments/reader.js';

const GIB = 1024 ** 3;
const TIB = 1024 * GIB;
const DEVICE_BLOCKS = TIB / 4096;
const CHUNK_BLOCKS = 16;
const EXTENTS_PER_COMMIT = 16;
/** Of a pack of 32 MiB with 1 MiB a commit. */
const COMMITS_PER_PACK = 32;
const FAN_OUT = 16;
const START_NS = 1_700_000_000_000_000_000n;
const VOLUME = 'b2'.repeat(16);
const REPOSITORY = 'be'.repeat(16);
const MAX_RSS_MIB = 256;
const GOAL_MS = 300;

/** One sample, as the child prints it. */
interface Sample {
  readonly seq: number;
  readonly segments: number;
  /** From the first line of the program on, in ms: modules loaded, segments open, time found, map open, block found. */
  readonly loadedMs: number;
  readonly openedMs: number;
  readonly foundMs: number;
  readonly mapMs: number;
  readonly firstMs: number;
  /** 1,000 more random blocks, one after the other, each. */
  readonly nextMs: number;
  readonly maxRssMiB: number;
}

interface Context {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly repositoryId: string;
  readonly volumeId: string;
  readonly cache: PageCache;
}

async function context(dir: string): Promise<Context> {
  const { openDirectoryStore } = await import('../src/repo/store-directory.js');
  const { keyRing } = await import('../src/format/seal.js');
  const { PageCache } = await import('../src/repo/segments/page-cache.js');
  const store = await openDirectoryStore(dir, { create: true });
  const keys = keyRing(Buffer.alloc(32, 1), true);
  return { store, keys, repositoryId: REPOSITORY, volumeId: VOLUME, cache: new PageCache() };
}

/** As VolumeHistory does it. */
async function openAll(ctx: Context): Promise<{ deltas: SegmentReader[]; fulls: SegmentReader[] }> {
  const { parseSegmentName, segmentName } = await import('../src/format/names.js');
  const { chooseSegments } = await import('../src/repo/segments/choose.js');
  const { openSegment } = await import('../src/repo/segments/reader.js');
  const names: SegmentName[] = [];
  for await (const { name } of ctx.store.list(`volumes/${ctx.volumeId}/manifest`)) {
    const parsed = parseSegmentName(name);
    if (parsed !== undefined) names.push(parsed);
  }
  const chosen = chooseSegments(names);
  const open = (s: SegmentName): Promise<SegmentReader> => openSegment(ctx, segmentName(s));
  const [deltas, fulls] = await Promise.all([
    Promise.all(chosen.chain.map((l) => open(l.segment))),
    Promise.all(chosen.fullMaps.map(open)),
  ]);
  return { deltas, fulls };
}

/** Sizes, in commits, of the segments that `commits` commits leave: those of the highest level first. */
function segmentSizes(commits: number): { level: number; count: number }[] {
  const sizes: { level: number; count: number }[] = [];
  let left = commits;
  for (let level = 5; level >= 0; level--) {
    const size = COMMITS_PER_PACK * FAN_OUT ** level;
    for (; left >= size; left -= size) sizes.push({ level, count: size });
  }
  if (left > 0) sizes.push({ level: 0, count: left });
  return sizes;
}

async function build(ctx: Context, commits: number): Promise<void> {
  const { memorySegment } = await import('../src/repo/segments/memory.js');
  const { putSegment, PackMap, copyCommits } = await import('../src/repo/segments/writer.js');
  const { putFullMap } = await import('../src/repo/segments/merge.js');
  const { nextStep } = await import('../src/repo/segments/maintain.js');
  const { encodeExtent, EXTENT_RECORD_BYTES } = await import('../src/format/extent.js');
  const target = () => ({
    store: ctx.store,
    keys: ctx.keys,
    repositoryId: ctx.repositoryId,
    volumeId: ctx.volumeId,
    chunkBlocks: CHUNK_BLOCKS,
    salt: randomBytes(16),
    createdNs: START_NS,
  });
  const packIdOf = (seq: number): string =>
    createHash('md5')
      .update(String(Math.floor((seq - 1) / COMMITS_PER_PACK)))
      .digest('hex');
  const hash = (seq: number): Buffer => {
    const h = Buffer.alloc(32);
    if (seq > 0) h.writeUInt32LE(seq, 0);
    return h;
  };
  const chunks = DEVICE_BLOCKS / CHUNK_BLOCKS;
  let seq = 0;
  let started = performance.now();
  for (const { level, count } of segmentSizes(commits)) {
    const first = seq + 1;
    const slab = Buffer.alloc(count * EXTENTS_PER_COMMIT * EXTENT_RECORD_BYTES);
    const list = Array.from({ length: count }, (_, n) => {
      seq++;
      const at = n * EXTENTS_PER_COMMIT * EXTENT_RECORD_BYTES;
      const places = new Set<number>();
      while (places.size < EXTENTS_PER_COMMIT) places.add(randomInt(chunks));
      [...places]
        .sort((a, b) => a - b)
        .forEach((chunk, i) => {
          const frame = ((seq - 1) % COMMITS_PER_PACK) * (EXTENTS_PER_COMMIT + 1) + i;
          encodeExtent(
            {
              block: chunk * CHUNK_BLOCKS,
              count: CHUNK_BLOCKS,
              seq: 0,
              pack: 0,
              frame,
              sub: 0,
              skip: 0,
            },
            slab,
            at + i * EXTENT_RECORD_BYTES,
          );
        });
      const packId = packIdOf(seq);
      const instantNs = START_NS + BigInt(seq) * 1_000_000_000n;
      return {
        seq,
        firstSeq: seq,
        full: false,
        packIds: [packId],
        extents: slab.subarray(at, at + EXTENTS_PER_COMMIT * EXTENT_RECORD_BYTES),
        record: {
          seq,
          firstSeq: seq,
          pointClass: 2 as const,
          coverage: 0 as const,
          flags: 0,
          epoch: 1,
          instantNs,
          startedNs: instantNs,
          writtenNs: instantNs + 5_000_000n,
          sizeBytes: TIB,
          hash: hash(seq),
          packId,
          frame: ((seq - 1) % COMMITS_PER_PACK) * (EXTENTS_PER_COMMIT + 1) + EXTENTS_PER_COMMIT,
          blocks: EXTENTS_PER_COMMIT * CHUNK_BLOCKS,
          storedBytes: EXTENTS_PER_COMMIT * 65_536,
        },
      };
    });
    const source = memorySegment(list, hash(first - 1));
    await putSegment(
      target(),
      { level, firstSeq: first, lastSeq: seq },
      source.index.prevHash,
      async function* (b) {
        const map = new PackMap(b, source);
        for (let p = 0; p < source.index.extents.length; p++) {
          const page = await source.extentPage(p);
          for (let i = 0; i < page.length; i++) {
            const pack = map.known(page.pack(i)) ?? (await map.learn(page.pack(i)));
            b.addExtent(
              page.block(i),
              page.count(i),
              first + page.seq(i),
              pack,
              page.frame(i),
              0,
              page.skip(i),
            );
          }
          yield;
        }
        yield* copyCommits(b, source, first - 1, seq);
      },
    );
    const { deltas, fulls } = await openAll(ctx);
    const facts = [...deltas, ...fulls].map((r) => ({
      ...r.header,
      extentCount: r.index.extentCount,
      lastFullFirstSeq: r.index.lastFullFirstSeq,
    }));
    const step = nextStep(facts, { fanOut: Infinity, minFullRecords: 65_536 });
    if (step?.kind === 'full') await putFullMap(target(), { deltas, fulls }, step.seq);
    for (const r of [...deltas, ...fulls]) await r.close();
    if (performance.now() - started > 5000) {
      started = performance.now();
      process.stderr.write(`  ${seq.toLocaleString('en')} commits\n`);
    }
  }
}

/** Where the one block lies that a volume of {@link buildRepository} really has. */
const REAL_BLOCK = DEVICE_BLOCKS / 2;

/**
 * A repository (key file `key` in it) with a volume `bench/1t` of that history, whose last commit has data: 64 KiB of the text
 * "b2 " from half of the device on. What the others name is nowhere.
 */
async function buildRepository(dir: string, commits: number): Promise<void> {
  const { Repository } = await import('../src/repo/repository.js');
  const { openDirectoryStore } = await import('../src/repo/store-directory.js');
  const { keyFileText, parseKeyFile } = await import('../src/repo/keys.js');
  const { writeVolumeMeta } = await import('../src/repo/volume.js');
  const { VolumeWriter } = await import('../src/repo/volume-writer.js');
  const { PageCache } = await import('../src/repo/segments/page-cache.js');
  const { currentIdentity } = await import('../src/process-identity.js');
  const { systemClock } = await import('../src/clock.js');
  const store = await openDirectoryStore(dir, { create: true });
  const text = keyFileText(randomBytes(32));
  writeFileSync(path.join(dir, 'key'), text, { mode: 0o600 });
  const repo = await Repository.init(
    store,
    { encryption: 'aes256-gcm', chunkBytes: CHUNK_BLOCKS * 4096, packBytes: 32 * 1024 ** 2 },
    { kind: 'keyFile', material: parseKeyFile(text, 'key'), source: 'key' },
    { clock: systemClock, random: (n) => randomBytes(n), owner: currentIdentity() },
  );
  const volumeId = repo.newId();
  await writeVolumeMeta(repo, {
    id: volumeId,
    name: 'bench/1t',
    host: 'bench',
    createdNs: START_NS,
    device: '/dev/bench',
    sizeBytes: TIB,
    logicalBlockBytes: 512,
    facts: {},
    updatedNs: START_NS,
  });
  const { keys } = repo;
  // The commits that are made up are of epoch 1: this claim.
  const first = await VolumeWriter.claim(repo, volumeId);
  await first.history.close();
  await first.writer.close();
  await build(
    { store, keys, repositoryId: repo.config.id, volumeId, cache: new PageCache() },
    commits,
  );
  const { writer, history } = await VolumeWriter.claim(repo, volumeId);
  await history.close();
  const pack = await writer.openPack();
  const data = Buffer.alloc(CHUNK_BLOCKS * 4096, 'b2 ');
  await pack.flush();
  const place = pack.addChunk(data, keys.chunkId(data));
  const now = systemClock.nowNs();
  await writer.commit({
    pointClass: 2,
    coverage: 0,
    full: false,
    instantNs: now,
    startedNs: now,
    sizeBytes: TIB,
    extents: [
      {
        block: REAL_BLOCK,
        count: CHUNK_BLOCKS,
        packId: pack.packId,
        frame: place,
        sub: 0,
        skip: 0,
      },
    ],
    storedBytes: data.length,
    facts: {},
  });
  await writer.close();
  await repo.close();
}

async function sample(dir: string, fraction: number): Promise<Sample> {
  const start = performance.now();
  const [{ Timeline }, { BlockMap }] = await Promise.all([
    import('../src/repo/timeline.js'),
    import('../src/repo/blockmap.js'),
  ]);
  const ctx = await context(dir);
  const loadedMs = performance.now() - start;
  const history = await openAll(ctx);
  const openedMs = performance.now() - start;
  const last = history.deltas.at(-1)?.lastSeq ?? 1;
  const seconds = BigInt(Math.max(1, Math.floor(last * fraction)));
  const found = await new Timeline(history.deltas).before(
    START_NS + seconds * 1_000_000_000n + 500n,
  );
  if (found === undefined || found.point.seq !== Number(seconds))
    throw new Error('the wrong point was found');
  const foundMs = performance.now() - start;
  const map = await BlockMap.open(history, found.point.seq, CHUNK_BLOCKS);
  const mapMs = performance.now() - start;
  const any = (): number => randomInt(DEVICE_BLOCKS);
  const block = any();
  await map.resolve(block, block + 1);
  const firstMs = performance.now() - start;
  const more = 1000;
  for (let n = 0; n < more; n++) {
    const b = any();
    await map.resolve(b, b + 1);
  }
  return {
    seq: found.point.seq,
    segments: history.deltas.length + history.fulls.length,
    loadedMs,
    openedMs,
    foundMs,
    mapMs,
    firstMs,
    nextMs: (performance.now() - start - firstMs) / more,
    maxRssMiB: maxRssMiB(),
  };
}

async function scanWhole(
  dir: string,
): Promise<{ seconds: number; extents: number; maxRssMiB: number }> {
  const { BlockMap } = await import('../src/repo/blockmap.js');
  const ctx = await context(dir);
  const history = await openAll(ctx);
  const map = await BlockMap.open(
    history,
    Math.floor((history.deltas.at(-1)?.lastSeq ?? 1) * 0.9),
    CHUNK_BLOCKS,
  );
  const start = performance.now();
  let extents = 0;
  for await (const batch of map.scan()) extents += batch.length;
  return {
    seconds: (performance.now() - start) / 1000,
    extents,
    maxRssMiB: maxRssMiB(),
  };
}

/** The most memory this process had resident. (getrusage would count what the parent had when it forked.) */
function maxRssMiB(): number {
  const [, kib = '0'] = /^VmHWM:\s*(\d+) kB/m.exec(readFileSync('/proc/self/status', 'utf8')) ?? [];
  return Number(kib) / 1024;
}

/** Takes the files below `dir` out of the page cache (posix_fadvise by dd, for lack of it in Node). */
function dropFromCache(dir: string): void {
  const files = readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((e) => e.isFile())
    .map((e) => path.join(e.parentPath, e.name));
  for (const file of files)
    spawnSync('dd', [`if=${file}`, 'iflag=nocache', 'count=0', 'status=none']);
}

function child<T>(...args: readonly string[]): T {
  const done = spawnSync(process.execPath, [fileURLToPath(import.meta.url), ...args], {
    encoding: 'utf8',
  });
  if (done.status !== 0) throw new Error(done.stderr);
  return JSON.parse(done.stdout) as T;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      dir: { type: 'string' },
      keep: { type: 'boolean', default: false },
      samples: { type: 'string', default: '12' },
      commits: { type: 'string', default: '1048544' },
      child: { type: 'string' },
      fraction: { type: 'string', default: '0.5' },
      repository: { type: 'string' },
    },
  });
  if (values.repository !== undefined)
    return buildRepository(values.repository, Number(values.commits));
  if (values.child !== undefined) {
    const dir = values.dir ?? '';
    const out =
      values.child === 'sample' ? await sample(dir, Number(values.fraction)) : await scanWhole(dir);
    process.stdout.write(JSON.stringify(out));
    return;
  }
  const dir = values.dir ?? mkdtempSync(path.join(tmpdir(), 'b2-bench-manifest-'));
  try {
    if (!existsSync(path.join(dir, 'volumes'))) {
      const start = performance.now();
      process.stderr.write(`building the manifest in ${dir}\n`);
      const ctx = await context(dir);
      await build(ctx, Number(values.commits));
      await ctx.store.close();
      spawnSync('sync');
      process.stderr.write(`built in ${((performance.now() - start) / 1000).toFixed(0)} s\n`);
    }
    const rows: Sample[] = [];
    for (let n = 0; n < Number(values.samples); n++) {
      dropFromCache(dir);
      const fraction = (n + 0.5) / Number(values.samples);
      rows.push(child<Sample>('--child', 'sample', '--dir', dir, '--fraction', String(fraction)));
    }
    const ms = (x: number): string => x.toFixed(0).padStart(6);
    console.log(
      '    commit  segments   modules  opened    time     map   first byte   next (each)   max RSS',
    );
    console.log(
      '                            ms      ms      ms      ms           ms            ms       MiB',
    );
    for (const r of rows) {
      console.log(
        `${String(r.seq).padStart(10)} ${String(r.segments).padStart(9)}    ${ms(r.loadedMs)}  ${ms(r.openedMs)}  ${ms(r.foundMs)}` +
          `  ${ms(r.mapMs)}       ${ms(r.firstMs)}        ${r.nextMs.toFixed(2).padStart(6)}    ${ms(r.maxRssMiB)}`,
      );
    }
    const whole = child<Awaited<ReturnType<typeof scanWhole>>>('--child', 'scan', '--dir', dir);
    console.log(
      `whole device: ${whole.extents.toLocaleString('en')} extents in ${whole.seconds.toFixed(1)} s, max RSS ${whole.maxRssMiB.toFixed(0)} MiB`,
    );
    const slowest = Math.max(...rows.map((r) => r.firstMs));
    const most = Math.max(whole.maxRssMiB, ...rows.map((r) => r.maxRssMiB));
    console.log(
      `first byte: at most ${slowest.toFixed(0)} ms (goal ${GOAL_MS}); memory: at most ${most.toFixed(0)} MiB (bound ${MAX_RSS_MIB})`,
    );
    if (most > MAX_RSS_MIB) process.exitCode = 1;
  } finally {
    if (!values.keep) rmSync(dir, { recursive: true, force: true });
  }
}

await main();
