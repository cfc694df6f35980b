/** Which points of several volumes are used together: of a group the very same instant, never another one unasked. */
import { beforeEach, describe, expect, it } from 'vitest';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { formatTimeNs } from '../../../src/human.js';
import {
  choosePointSet,
  groupOf,
  REACH_NS,
  type PointSet,
  type PointSetOptions,
} from '../../../src/repo/point-set.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import {
  addSnapshot,
  listVolumes,
  readVolumeMeta,
  writeVolumeMeta,
} from '../../../src/repo/volume.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { parseWhen } from '../../../src/when.js';
import {
  CHEAP,
  CHUNK_BYTES,
  PASSWORD,
  seeded,
  testEnvironment,
} from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';

const BLOCK = 4096;
const BLOCKS = 4;
const START_NS = 1_700_000_000_000_000_000n;
/** The instant of that second. */
const at = (seconds: number): bigint => START_NS + BigInt(Math.round(seconds * 1000)) * 1_000_000n;

interface Made {
  readonly id: string;
  /** A point of that instant, whose first block is full of `fill`. */
  point(seconds: number, fill?: number, pointClass?: PointClass): Promise<void>;
  /** Another process goes on with it. */
  again(): Promise<void>;
}

let store: MemoryStore;
let repo: Repository;
let told: { warnings: string[]; notes: string[] };

async function newRepository(isEncrypted = false): Promise<void> {
  store = new MemoryStore();
  repo = await Repository.init(
    store,
    {
      encryption: isEncrypted ? 'aes256-gcm' : 'none',
      chunkBytes: CHUNK_BYTES,
      packBytes: 1024 * 1024,
    },
    isEncrypted ? PASSWORD : undefined,
    testEnvironment(seeded(7)),
    CHEAP,
  );
  told = { warnings: [], notes: [] };
}
beforeEach(() => newRepository());

async function volume(
  name: string,
  group = 'data',
  device = `/dev/${name.split('/')[1] ?? ''}`,
): Promise<Made> {
  const id = repo.newId();
  await writeVolumeMeta(repo, {
    id,
    name,
    host: name.split('/')[0] ?? '',
    createdNs: 1n,
    device,
    sizeBytes: BLOCKS * BLOCK,
    logicalBlockBytes: 512,
    facts: group === '' ? {} : { group },
    updatedNs: 1n,
  });
  let { writer, history } = await VolumeWriter.claim(repo, id);
  return {
    id,
    async again() {
      ({ writer, history } = await VolumeWriter.claim(repo, id));
    },
    async point(seconds, fill = 1, pointClass = PointClass.crash) {
      const bytes = Buffer.alloc(BLOCK, fill);
      const full = writer.tipSizeBytes === undefined;
      const pack = await writer.openPack();
      await pack.flush();
      const frame = pack.addChunks([{ bytes, id: repo.keys.chunkId(bytes) }]);
      await writer.commit({
        pointClass,
        coverage: Coverage.exact,
        full,
        instantNs: at(seconds),
        startedNs: at(seconds),
        sizeBytes: BLOCKS * BLOCK,
        extents: [
          { block: 0, count: 1, packId: pack.packId, frame, sub: 0, skip: 0 },
          { block: 1, count: BLOCKS - 1, packId: undefined, frame: 0, sub: 0, skip: 0 },
        ],
        storedBytes: 0,
        facts: {},
      });
      await history.settle();
      await history.close();
    },
  };
}

/** A point of one instant of all. */
async function shared(seconds: number, volumes: readonly Made[], fill?: number): Promise<void> {
  for (const v of volumes) await v.point(seconds, fill);
}

async function choose(
  name: string,
  when = 'latest',
  options: Partial<Omit<PointSetOptions, 'beside'>> & { readonly beside?: readonly Made[] } = {},
): Promise<PointSet> {
  const volumes = await listVolumes(repo, (text) => told.warnings.push(text));
  const found = volumes.find((v) => v.name === name);
  if (found === undefined) throw new Error(`no volume ${name}`);
  const { beside = [], ...rest } = options;
  const set = await choosePointSet(repo, volumes, found, parseWhen(when, at(100_000)), {
    beside: volumes.filter((v) => beside.some((b) => b.id === v.id)),
    warn: (text, hint) => told.warnings.push(hint === undefined ? text : `${text} | ${hint}`),
    note: (text) => told.notes.push(text),
    ...rest,
  });
  await set.close();
  return set;
}

/** `web/sda #3 asked`, … */
function shown(set: PointSet): readonly string[] {
  return set.members.map((m) => `${m.volume.name} #${m.commit.seq} ${m.reason}`);
}

describe('the points of a group', () => {
  it('are of one instant, the first is the one that was asked for, the others come by device', async () => {
    const all = [
      await volume('web/root', 'data', '/dev/sdaa'),
      await volume('web/sdc'),
      await volume('web/z', 'data', '/dev/sdb'),
      await volume('web/n', 'data', '/dev/nvme0n1'),
    ];
    await shared(1, all);
    await shared(2, all);
    // Others: of another group, another host, none.
    await (await volume('web/sdd', 'other')).point(1.999);
    await (await volume('db/sda')).point(2);
    await (await volume('web/x', '')).point(1.998);
    const set = await choose('web/sdc');
    expect(shown(set)).toEqual([
      'web/sdc #2 asked',
      'web/z #2 group',
      'web/root #2 group',
      'web/n #2 group',
    ]);
    expect(set).toMatchObject({ group: 'data', isWhole: true, left: [], passedOver: undefined });
    expect(set.members.map((m) => set.ageNs(m))).toEqual([0n, 0n, 0n, 0n]);
    expect(told).toEqual({ warnings: [], notes: [] });
    expect(shown(await choose('web/sdc', '#1'))).toEqual([
      'web/sdc #1 asked',
      'web/z #1 group',
      'web/root #1 group',
      'web/n #1 group',
    ]);
    expect(shown(await choose('web/x'))).toEqual(['web/x #1 asked']);
    expect(shown(await choose('web/sdc', 'latest', { alone: true }))).toEqual(['web/sdc #2 asked']);
  });

  it('are found by a snapshot of the one that was asked for, and by its time', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await b.point(0.5);
    await shared(1, [a, b]);
    await shared(2, [a, b]);
    const { hash } = await choose('web/sda', '#1').then((s) => s.first.commit);
    await addSnapshot(repo, {
      name: 'before',
      volumeId: a.id,
      seq: 1,
      hash: hash.toString('hex'),
      instantNs: at(1),
      pointClass: PointClass.crash,
      tags: [],
      createdNs: at(1),
    });
    for (const when of ['before', formatTimeNs(at(1)), formatTimeNs(at(1.9))]) {
      const set = await choose('web/sda', when);
      expect(shown(set)).toEqual(['web/sda #1 asked', 'web/sdb #2 group']);
    }
  });

  it('in an encrypted repository are those of the images, too', async () => {
    await newRepository(true);
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b], 0x11);
    await shared(2, [a, b], 0x22);
    await a.point(3, 0x33);
    await b.point(4, 0x44);
    const volumes = await listVolumes(repo, () => undefined);
    const [first] = volumes.filter((v) => v.id === a.id);
    if (first === undefined) throw new Error('no volume');
    const set = await choosePointSet(
      repo,
      volumes,
      first,
      { kind: 'latest' },
      {
        warn: () => undefined,
        note: () => undefined,
      },
    );
    for (const { history, volume: v, commit } of set.members) {
      const image = await openImage(history, v, commit.seq);
      const bytes = Buffer.alloc(BLOCK);
      await image.read(bytes, 0);
      expect(bytes.equals(Buffer.alloc(BLOCK, 0x22))).toBe(true);
    }
    expect(set.members.length).toBe(2);
    await set.close();
  });
});

describe('a newest point that others of the group lack', () => {
  it('is passed over for one that they have, at most a minute older, and that is noted', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b]);
    await shared(2, [a, b]);
    await a.point(3); // the crash came before it was durable in the other
    const set = await choose('web/sda');
    expect(shown(set)).toEqual(['web/sda #2 asked', 'web/sdb #2 group']);
    expect(set.passedOver?.seq).toBe(3);
    expect(told.warnings).toEqual([]);
    expect(told.notes).toEqual([
      'web/sda has a newer point, #3, 1s later, which not all of group data have; #2 is one instant with web/sdb',
    ]);
    // The other way round there is nothing to pass over.
    expect((await choose('web/sdb')).passedOver).toBe(undefined);
    // A time is the same as "latest".
    expect(shown(await choose('web/sda', formatTimeNs(at(3.5))))).toEqual(shown(set));
  });

  it('is never exchanged where it was named: by its id, its snapshot, its very instant', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b]);
    await a.point(2);
    for (const when of ['#2', formatTimeNs(at(2))]) {
      told.warnings.length = 0;
      const set = await choose('web/sda', when);
      expect(shown(set)).toEqual(['web/sda #2 asked']);
      expect(set.isWhole).toBe(false);
      expect(told.warnings.length).toBe(1);
    }
    expect(told.notes).toEqual([]);
  });

  it('is taken, without the others, where what they share is older than that', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(0, [a, b]);
    const far = Number(REACH_NS / 1_000_000_000n) + 1;
    await b.point(far - 3);
    await a.point(far);
    const set = await choose('web/sda');
    expect(shown(set)).toEqual(['web/sda #2 asked']);
    expect(set.left).toMatchObject([{ volume: { name: 'web/sdb' } }]);
    expect(set.passedOver).toBe(undefined);
    expect(told.warnings).toEqual([
      expect.stringMatching(
        /^web\/sdb of group data is left out: it has no point of the instant of web\/sda #2, .* \(its newest before that is #2, 3s older\) \| The newest that all of group data have is 1m 01s older: --at 2023-11-14T22:13:20\.000000000Z\. Or, of another instant: --with web\/sdb\.$/,
      ),
    ]);
    // What the warning says can be had.
    const older = await choose('web/sda', '2023-11-14T22:13:20.000000000Z');
    expect(shown(older)).toEqual(['web/sda #1 asked', 'web/sdb #1 group']);
    const beside = await choose('web/sda', 'latest', { beside: [b] });
    expect(shown(beside)).toEqual(['web/sda #2 asked', 'web/sdb #2 with']);
  });

  it('goes without those alone that are not of its instant: one that was taken out of the group long ago, or lost a point', async () => {
    const [a, b, c] = [await volume('web/sda'), await volume('web/sdb'), await volume('web/sdc')];
    await shared(0, [a, b, c]);
    await shared(1000, [a, b]); // sdc lacks it
    await shared(1001, [a, b]);
    await a.point(1002);
    const set = await choose('web/sda');
    expect(shown(set)).toEqual(['web/sda #3 asked', 'web/sdb #3 group']);
    expect(set.left.map((l) => l.volume.name)).toEqual(['web/sdc']);
    expect(told.warnings.length).toBe(1);
    expect(told.warnings[0]).toContain('web/sdc of group data is left out');
    expect(told.warnings[0]).toContain('--at 2023-11-14T22:13:20.000000000Z');
  });

  it('is the one that most have, and of those the newest', async () => {
    const [a, b, c] = [await volume('web/sda'), await volume('web/sdb'), await volume('web/sdc')];
    await shared(10, [a, b, c]);
    await shared(20, [a, b, c]);
    await shared(30, [a, c]);
    await shared(40, [a, b]);
    expect(shown(await choose('web/sda'))).toEqual([
      'web/sda #2 asked',
      'web/sdb #2 group',
      'web/sdc #2 group',
    ]);
    expect((await choose('web/sda')).passedOver?.seq).toBe(4);
    await shared(95, [a, b]);
    // 20 is out of reach now; 95, 40 and 30 have two each.
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #5 asked', 'web/sdb #4 group']);
  });

  it('does not matter to who wants any point of the whole group', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await a.point(-100);
    await shared(0, [a, b]);
    await shared(5, [a, b]);
    for (let i = 0; i < 20; i++) await a.point(1000 + i);
    for (let i = 0; i < 20; i++) await b.point(1000.5 + i);
    const set = await choose('web/sda', 'latest', { whole: true });
    expect(shown(set)).toEqual(['web/sda #3 asked', 'web/sdb #2 group']);
    expect(set.passedOver).toBe(undefined);
    // Where there is none up to then, the newest there is.
    const any = await choose('web/sda', '#1', { whole: true });
    expect(shown(any)).toEqual(['web/sda #3 asked', 'web/sdb #2 group']);
    expect(told).toEqual({ warnings: [], notes: [] });
  });
});

describe('a volume of the group', () => {
  it('that has no point at all is left out, with what there is instead', async () => {
    const a = await volume('web/sda');
    await volume('web/sdb');
    await a.point(1);
    const set = await choose('web/sda');
    expect(shown(set)).toEqual(['web/sda #1 asked']);
    expect(told.warnings).toEqual([
      expect.stringMatching(
        /^web\/sdb .*\(and none before\) \| No older instant was found that all of group data have\.$/,
      ),
    ]);
  });

  it('that has a fuzzy point of that instant has none', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await a.point(1);
    await b.point(1, 1, PointClass.fuzzy);
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #1 asked']);
    expect(told.warnings.length).toBe(1);
  });

  it('that was deleted is missed, if it was the only other one', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b]);
    for await (const { name } of store.list(`volumes/${b.id}`)) await store.delete(name);
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #1 asked']);
    expect(told.warnings).toEqual([
      'web/sda was captured in group data, but this repository has no other volume of it',
    ]);
  });

  it('whose history has a hole is left out, and said to be', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b]);
    await b.again();
    await shared(2, [a, b]);
    let segments = 0;
    for await (const { name } of store.list(`volumes/${b.id}/manifest`)) {
      await store.delete(name);
      segments++;
    }
    expect(segments).toBe(1);
    const set = await choose('web/sda');
    expect(shown(set)).toEqual(['web/sda #2 asked']);
    expect(set.left[0]?.why).toMatch(/^commit 1 of volume \w+ is missing/);
    expect(told.warnings).toEqual([
      expect.stringMatching(/^web\/sdb of group data is left out: commit 1 of volume/),
    ]);
  });

  it('whose clock was put back is found by its instant all the same', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(5000, [a, b]);
    await shared(1000, [a, b]);
    await shared(1001, [a, b]);
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #3 asked', 'web/sdb #3 group']);
    expect(shown(await choose('web/sda', '#1'))).toEqual(['web/sda #1 asked', 'web/sdb #1 group']);
  });
});

describe('volumes beside', () => {
  it('have their newest exact point not after that of the first, never a later one', async () => {
    const [a, x] = [await volume('web/sda', ''), await volume('nas/sdx', '')];
    await a.point(100);
    await a.point(200);
    await x.point(50);
    await x.point(170);
    await x.point(180, 1, PointClass.fuzzy);
    await x.point(201);
    const set = await choose('web/sda', 'latest', { beside: [x, x] });
    expect(shown(set)).toEqual(['web/sda #2 asked', 'nas/sdx #2 with']);
    expect(set.members.map((m) => set.ageNs(m))).toEqual([0n, 30_000_000_000n]);
    expect(shown(await choose('web/sda', '#1', { beside: [x] }))).toEqual([
      'web/sda #1 asked',
      'nas/sdx #1 with',
    ]);
  });

  it('that have no such point are an error, as is the first itself', async () => {
    const [a, x] = [await volume('web/sda', ''), await volume('nas/sdx', '')];
    await a.point(100);
    await x.point(101);
    await expect(choose('web/sda', 'latest', { beside: [x] })).rejects.toMatchObject({
      kind: 'not-found',
      message: expect.stringContaining('volume nas/sdx has no exact point at or before') as string,
    });
    await expect(choose('web/sda', 'latest', { beside: [a] })).rejects.toMatchObject({
      kind: 'usage',
    });
  });

  it('that are of the group and of its instant change nothing; without the group they come alone', async () => {
    const [a, b, c] = [await volume('web/sda'), await volume('web/sdb'), await volume('web/sdc')];
    await shared(1, [a, b, c]);
    expect(shown(await choose('web/sda', 'latest', { beside: [c] }))).toEqual([
      'web/sda #1 asked',
      'web/sdb #1 group',
      'web/sdc #1 group',
    ]);
    expect(shown(await choose('web/sda', 'latest', { beside: [c], alone: true }))).toEqual([
      'web/sda #1 asked',
      'web/sdc #1 with',
    ]);
  });
});

describe('a volume that was taken out of a group, and is captured no more', () => {
  it('is missed by nobody afterwards, and found at the instants at which it was of it', async () => {
    const [a, b, old] = [await volume('web/a'), await volume('web/b'), await volume('web/old')];
    const setFacts = async (v: Made, ...devices: readonly string[]): Promise<void> => {
      const meta = await readVolumeMeta(repo, v.id);
      const facts = { group: 'data', groupDevice: meta.device, groupDevices: devices };
      await writeVolumeMeta(repo, { ...meta, facts });
    };
    await shared(1, [a, b, old]);
    const seen = async (v: Made): Promise<unknown> => {
      const volumes = await listVolumes(repo, () => undefined);
      const meta = volumes.find((m) => m.id === v.id);
      const group = meta === undefined ? undefined : groupOf(meta, volumes);
      return [group?.others.map((o) => o.name), group?.former.map((o) => o.name)];
    };
    await setFacts(old, '/dev/a', '/dev/b', '/dev/old');
    // Nobody knows what the group consists of now: a version that did not record it.
    expect(await seen(a)).toEqual([['web/b', 'web/old'], []]);
    await setFacts(a, '/dev/a', '/dev/b');
    await setFacts(b, '/dev/a', '/dev/b');
    expect(await seen(a)).toEqual([['web/b'], ['web/old']]);
    expect(await seen(old)).toEqual([['web/a', 'web/b'], []]);

    await shared(2, [a, b]);
    expect(shown(await choose('web/a'))).toEqual(['web/a #2 asked', 'web/b #2 group']);
    expect(told).toEqual({ warnings: [], notes: [] });
    expect(shown(await choose('web/a', '#1'))).toEqual([
      'web/a #1 asked',
      'web/b #1 group',
      'web/old #1 group',
    ]);
  });
});

describe('a volume that is of no group any more', () => {
  it('has the others of an instant at which it was, and is alone otherwise', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    const db = await volume('db/sda');
    await shared(1, [a, b, db]);
    const meta = await readVolumeMeta(repo, a.id);
    await writeVolumeMeta(repo, { ...meta, facts: { group: undefined } });
    await a.point(2);
    const volumes = await listVolumes(repo, () => undefined);
    const [first] = volumes.filter((v) => v.id === a.id);
    expect(first === undefined ? undefined : groupOf(first, volumes)).toBe(undefined);
    expect(shown(await choose('web/sda', '#1'))).toEqual(['web/sda #1 asked', 'web/sdb #1 group']);
    expect(shown(await choose('web/sda', '#1', { alone: true }))).toEqual(['web/sda #1 asked']);
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #2 asked']);
    expect(told).toEqual({ warnings: [], notes: [] });
    // The other one still is, and finds it.
    expect(shown(await choose('web/sdb'))).toEqual(['web/sdb #1 asked', 'web/sda #1 group']);
  });

  it('because its meta object is lost, is found by the instant all the same', async () => {
    const [a, b] = [await volume('web/sda'), await volume('web/sdb')];
    await shared(1, [a, b]);
    await store.delete(`volumes/${b.id}/meta`);
    expect(shown(await choose('web/sda'))).toEqual(['web/sda #1 asked', `lost-${b.id} #1 group`]);
  });
});
