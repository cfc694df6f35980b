#!/usr/bin/env node
// Makes a golden repository: what today's program writes, kept for ever, so that every later version is tested to read
// it (test/fixtures/golden/README.md). Clock, randomness and owner are fixed, so the same program makes the same bytes
// (but for what the file system says about the image files that are captured, in two meta objects).
// It refuses a directory that exists: golden files are added to, never changed.
//
// usage: npm run build && node scripts/make-golden.mjs test/fixtures/golden/v1
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const dist = (name) => import(join(root, 'dist', name));
const { takeSnapshot } = await dist('capture/snapshot.js');
const { Coverage, PointClass } = await dist('format/commit.js');
const { packName } = await dist('format/names.js');
const { VolumeHistory } = await dist('repo/history.js');
const { segmentTarget } = await dist('repo/maintenance.js');
const { keyFileText, parseKeyFile } = await dist('repo/keys.js');
const { Repository } = await dist('repo/repository.js');
const { putFullMap } = await dist('repo/segments/merge.js');
const { openDirectoryStore } = await dist('repo/store-directory.js');
const { addSnapshot, writeVolumeMeta } = await dist('repo/volume.js');
const { VolumeWriter } = await dist('repo/volume-writer.js');

const out = process.argv[2];
if (out === undefined) {
  console.error('usage: make-golden.mjs DIRECTORY');
  process.exit(2);
}
if (existsSync(out)) {
  console.error(`${out} exists: golden files are never changed. Make another one beside it.`);
  process.exit(1);
}

const BLOCK = 4096;
const CHUNK = 16_384;
const PASSWORD = 'golden password, not a secret';
/** The least that the format allows: these repositories protect nothing. */
const COST = { N: 16_384, r: 1, p: 1 };
/** Devices are recorded by their path. */
const SOURCES = '/tmp/b2-golden-sources';

/** Bytes in [0, 256) from mulberry32: the same for the same seed. */
function generator(seed) {
  let a = seed >>> 0;
  const next = () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = a;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
  return { next, bytes: (n) => Uint8Array.from({ length: n }, () => Math.floor(next() * 256)) };
}

/** Goes on by a millisecond each time it is asked, so that order shows. */
function fixedClock() {
  let wall = 1_750_000_000_000_000_000n;
  let mono = 1_000_000_000n;
  return {
    nowNs: () => (wall += 1_000_000n),
    monotonicNs: () => (mono += 1_000_000n),
    // Leases are renewed by real time, which these few writes do not need.
    sleep: (ms, signal) =>
      new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        signal?.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true });
      }),
    passSeconds: (s) => {
      wall += BigInt(s) * 1_000_000_000n;
    },
  };
}

const owner = { host: 'golden', machineId: '', bootId: '', pid: 1, startTicks: '', namespaces: '' };
const sha256 = (data) => createHash('sha256').update(data).digest('hex');

/** A directory store that cannot append, as S3 cannot. */
function withoutAppend(store) {
  const { put, putStream, get, open, stat, list, space, close } = store;
  return {
    url: store.url,
    canAppend: false,
    put: put.bind(store),
    putStream: putStream.bind(store),
    get: get.bind(store),
    open: open.bind(store),
    stat: stat.bind(store),
    list: list.bind(store),
    delete: store.delete.bind(store),
    openAppend: () => Promise.reject(new Error('this store does not append')),
    space: space.bind(store),
    close: close.bind(store),
  };
}

/** A volume whose changes are made here and written through the real writer; notes what each point must restore to. */
class Model {
  constructor(repo, clock, random, id, sizeBytes) {
    Object.assign(this, { repo, clock, random, id, expected: [], snapshots: [] });
    this.data = Buffer.alloc(sizeBytes);
  }

  /** Fills blocks with bytes that do not compress, a text that does, or zeros. */
  change(from, count, kind) {
    const part = this.data.subarray(
      from * BLOCK,
      Math.min(this.data.length, (from + count) * BLOCK),
    );
    if (kind === 'zeros') part.fill(0);
    else if (kind === 'text') part.fill(`golden block ${from} `);
    else part.set(this.random.bytes(part.length));
    return Array.from({ length: count }, (_, i) => from + i).filter(
      (b) => b * BLOCK < this.data.length,
    );
  }

  resize(sizeBytes) {
    const next = Buffer.alloc(sizeBytes);
    this.data.copy(next, 0, 0, Math.min(sizeBytes, this.data.length));
    this.data = next;
  }

  /** One commit: whole chunks in frames of their own, the rest in one shared frame. */
  async capture(
    writer,
    blocks,
    { full = false, pointClass = PointClass.crash, coverage = Coverage.exact } = {},
  ) {
    const pack = await writer.openPack();
    const perChunk = CHUNK / BLOCK;
    const extents = [];
    const shared = [];
    for (let i = 0; i < blocks.length;) {
      const block = blocks[i];
      let count = 1;
      while (
        count < perChunk &&
        blocks[i + count] === block + count &&
        (block + count) % perChunk !== 0
      )
        count++;
      i += count;
      const bytes = this.data.subarray(
        block * BLOCK,
        Math.min(this.data.length, (block + count) * BLOCK),
      );
      if (bytes.every((b) => b === 0)) {
        extents.push({ block, count, packId: undefined, frame: 0, sub: 0, skip: 0 });
        continue;
      }
      const id = this.repo.keys.chunkId(bytes);
      if (count < perChunk) {
        shared.push({ bytes, id, block, count });
        continue;
      }
      await pack.flush();
      extents.push({
        block,
        count,
        packId: pack.packId,
        frame: pack.addChunk(bytes, id),
        sub: 0,
        skip: 0,
      });
    }
    if (shared.length > 0) {
      await pack.flush();
      const frame = pack.addChunks(shared);
      shared.forEach(({ block, count }, sub) => {
        extents.push({ block, count, packId: pack.packId, frame, sub, skip: 0 });
      });
    }
    extents.sort((a, b) => a.block - b.block);
    const now = this.clock.nowNs();
    const point = await writer.commit({
      pointClass,
      coverage,
      full,
      instantNs: now,
      startedNs: now - 1_000_000n,
      sizeBytes: this.data.length,
      extents,
      storedBytes: 4711,
      facts: { source: 'golden', host: 'golden' },
    });
    this.note(point, pointClass);
    this.clock.passSeconds(1);
    return point;
  }

  note(point, pointClass) {
    this.expected.push({
      seq: point.seq,
      hash: point.hash.toString('hex'),
      instantNs: String(point.instantNs),
      pointClass,
      sizeBytes: this.data.length,
      sha256: sha256(this.data),
    });
  }

  async pin(name, point) {
    await addSnapshot(this.repo, {
      name,
      volumeId: this.id,
      seq: point.seq,
      hash: point.hash.toString('hex'),
      instantNs: point.instantNs,
      pointClass: PointClass.crash,
      tags: ['golden', name],
      createdNs: this.clock.nowNs(),
    });
    this.snapshots.push({ name, seq: point.seq });
  }
}

async function newRepository(name, seed, { encryption, secret, append = true }) {
  const clock = fixedClock();
  const random = generator(seed);
  const directory = await openDirectoryStore(join(out, name), { create: true });
  const store = append ? directory : withoutAppend(directory);
  const repo = await Repository.init(
    store,
    { encryption, chunkBytes: CHUNK, packBytes: 1024 * 1024 },
    secret,
    { clock, random: random.bytes, owner },
    COST,
  );
  return { repo, clock, random };
}

async function newVolume({ repo, clock, random }, name, sizeBytes) {
  const id = repo.newId();
  await writeVolumeMeta(repo, {
    id,
    name,
    host: name.split('/')[0],
    createdNs: clock.nowNs(),
    device: '/dev/sda',
    sizeBytes,
    logicalBlockBytes: 512,
    facts: { identity: { serial: 'GOLDEN' } },
    updatedNs: clock.nowNs(),
  });
  return new Model(repo, clock, random, id, sizeBytes);
}

const describe = (model, name) => ({
  id: model.id,
  name,
  snapshots: model.snapshots,
  points: model.expected,
});

/** Captures of image files by the scanner, as `b2 snapshot` makes them; two keys; two volumes that share data. */
async function makePassword() {
  const secret = { kind: 'password', password: PASSWORD, source: 'golden' };
  const made = await newRepository('password', 1, { encryption: 'aes256-gcm', secret });
  const { repo, clock, random } = made;
  await repo.addKey(
    { kind: 'password', password: 'another: ünïcode', source: 'golden' },
    'second key',
    COST,
  );
  mkdirSync(SOURCES, { recursive: true });
  const volumes = [];
  try {
    for (const name of ['web1/sda', 'web2/sda']) {
      const model = new Model(repo, clock, generator(77), '', 40 * BLOCK + 1234);
      model.change(0, 9, 'noise');
      model.change(20, 11, 'text');
      const file = join(SOURCES, `${name.replace('/', '-')}.img`);
      for (const snapshot of ['one', 'two', 'three']) {
        if (snapshot === 'two') model.change(8, 2, name === 'web1/sda' ? 'noise' : 'text');
        if (snapshot === 'three') model.resize(45 * BLOCK + 10);
        writeFileSync(file, model.data);
        const done = await takeSnapshot(repo, {
          device: file,
          volume: name,
          name: snapshot,
          tags: ['golden'],
          skipUnreadable: false,
          takeOver: false,
          host: 'golden',
          dedupeCacheFile: undefined,
          workers: 0,
          storeUrl: undefined,
          signal: new AbortController().signal,
          events: () => undefined,
        });
        model.id = done.volume.id;
        model.note(done.point, done.pointClass);
        model.snapshots.push({ name: snapshot, seq: done.point.seq });
      }
      volumes.push(describe(model, name));
    }
  } finally {
    rmSync(SOURCES, { recursive: true, force: true });
  }
  random.next();
  await repo.close();
  return {
    name: 'password',
    password: PASSWORD,
    passwords: [PASSWORD, 'another: ünïcode'],
    volumes,
  };
}

/** Segments of two levels, a full map, a pack of the journal left unsealed with a torn end, a resize, all classes. */
async function makeKeyFile() {
  const material = generator(99).bytes(32);
  const file = join(out, 'keyfile.key');
  writeFileSync(file, keyFileText(material), { mode: 0o600 });
  const secret = {
    kind: 'keyFile',
    material: parseKeyFile(keyFileText(material), file),
    source: file,
  };
  const made = await newRepository('keyfile', 2, { encryption: 'aes256-gcm', secret });
  const { repo, clock } = made;
  const model = await newVolume(made, 'db/sdb', 24 * BLOCK + 777);
  const { writer, history } = await VolumeWriter.claim(repo, model.id);
  await history.close();
  await model.capture(writer, [...model.change(0, 6, 'noise'), ...model.change(10, 14, 'text')], {
    full: true,
  });
  const classes = [PointClass.fuzzy, PointClass.crash, PointClass.fs, PointClass.app];
  for (let i = 1; i <= 18; i++) {
    const kind = ['noise', 'text', 'zeros'][i % 3];
    const point = await model.capture(writer, model.change((i * 5) % 23, 1 + (i % 2), kind), {
      pointClass: classes[i % 4],
      coverage: i % 5 === 0 ? Coverage.unknown : i % 7 === 0 ? Coverage.coalesced : Coverage.exact,
    });
    if (i === 9) await model.pin('before upgrade', point);
    await writer.finishPack();
  }
  // The end lay within block 24, which the commit that grows the device must name.
  const oldEnd = Math.floor(model.data.length / BLOCK);
  model.resize(30 * BLOCK);
  await model.capture(writer, [
    ...model.change(oldEnd, 1, 'noise'),
    ...model.change(27, 2, 'text'),
  ]);
  await writer.finishPack();
  const view = await VolumeHistory.open(repo, model.id);
  await putFullMap(
    segmentTarget(repo, model.id),
    { deltas: view.sources, fulls: view.fulls },
    model.expected.length,
  );
  await view.close();
  await model.capture(writer, model.change(1, 3, 'noise'));
  const tip = await model.capture(writer, model.change(5, 1, 'zeros'));
  await model.pin('tip', tip);
  const pack = await writer.openPack();
  // A process that died: the pack stays open in the journal, and bytes that were never synced lie at its end.
  await repo.close();
  appendFileSync(join(out, 'keyfile', packName(pack.packId)), generator(3).bytes(100));
  clock.passSeconds(1);
  return { name: 'keyfile', keyFile: 'keyfile.key', volumes: [describe(model, 'db/sdb')] };
}

/** No encryption; a store that appends; two epochs; a device that shrinks and grows again. */
async function makePlain() {
  const made = await newRepository('plain', 4, { encryption: 'none' });
  const { repo } = made;
  const model = await newVolume(made, 'plain/disk', 20 * BLOCK);
  const first = await VolumeWriter.claim(repo, model.id);
  await first.history.close();
  await model.capture(
    first.writer,
    [...model.change(0, 8, 'noise'), ...model.change(12, 8, 'text')],
    { full: true },
  );
  await model.capture(first.writer, model.change(3, 2, 'zeros'));
  await first.writer.close();
  const second = await VolumeWriter.claim(repo, model.id);
  await second.history.close();
  model.resize(10 * BLOCK);
  await model.capture(second.writer, model.change(9, 1, 'noise'));
  model.resize(16 * BLOCK + 5);
  await model.capture(second.writer, [
    ...model.change(11, 1, 'noise'),
    ...model.change(16, 1, 'text'),
  ]);
  // Full: what is not named is zeros.
  model.change(0, 17, 'zeros');
  await model.pin(
    'end',
    await model.capture(second.writer, model.change(2, 12, 'text'), { full: true }),
  );
  await second.writer.close();
  await repo.close();
  return { name: 'plain', volumes: [describe(model, 'plain/disk')] };
}

/** A store without append: a pack a commit, and the last ones still in the journal. */
async function makeNoAppend() {
  const secret = { kind: 'password', password: PASSWORD, source: 'golden' };
  const made = await newRepository('no-append', 5, {
    encryption: 'aes256-gcm',
    secret,
    append: false,
  });
  const { repo } = made;
  const model = await newVolume(made, 'bucket/disk', 16 * BLOCK);
  const { writer, history } = await VolumeWriter.claim(repo, model.id);
  await history.close();
  await model.capture(writer, model.change(0, 7, 'noise'), { full: true });
  await model.capture(writer, model.change(6, 4, 'text'));
  await writer.finishPack();
  for (let i = 0; i < 4; i++)
    await model.capture(writer, model.change(i * 3, 2, i === 2 ? 'zeros' : 'noise'));
  await repo.close();
  return {
    name: 'no-append',
    password: PASSWORD,
    passwords: [PASSWORD],
    volumes: [describe(model, 'bucket/disk')],
  };
}

mkdirSync(out, { recursive: true });
const repositories = [
  await makePassword(),
  await makeKeyFile(),
  await makePlain(),
  await makeNoAppend(),
];
writeFileSync(
  join(out, 'expected.json'),
  `${JSON.stringify({ format: 1, repositories }, null, 1)}\n`,
);
console.log(`made ${repositories.map((r) => r.name).join(', ')} in ${out}`);
