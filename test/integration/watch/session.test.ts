/** A session on real loop devices: writers that never pause, stops and starts, sizes, removal and return, and what each of them restores to. */
import { spawn } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect } from 'vitest';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { Quiescer } from '../../../src/capture/freeze/index.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import { openStore } from '../../../src/repo/store-url.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { listVolumes } from '../../../src/repo/volume.js';
import { startSession, type SessionOptions } from '../../../src/watch/session.js';
import type { WatchEvent, WatchSession } from '../../../src/watch/types.js';
import { DISK_NEEDS, addPartitions, noise, pokeWithDd, tool } from '../../support/disks.js';
import {
  attachLoop,
  makeFileSystem,
  mountDevice,
  newLoop,
  runTool,
  sparseFile,
  type Mount,
} from '../../support/loop.js';
import { requires, type Needs } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
/** Stops in the middle of writes; more where somebody asks for them. */
const ROUNDS = Number(process.env['B2_WATCH_ROUNDS'] ?? 4);
const NEEDS: Needs = {
  ...DISK_NEEDS,
  also: () => {
    if (process.geteuid?.() !== 0) return undefined; // said by `root`
    return existsSync(TRACEFS) ? undefined : 'a kernel with tracefs';
  },
};

let dir: TempDir;
let repo: Repository;
const running = new Set<WatchSession>();

beforeEach(async () => {
  dir = tempDir();
  const url = dir.join('repo');
  repo = await Repository.init(
    await openStore(url, { create: true }),
    { encryption: 'none', chunkBytes: 65_536, packBytes: 4 * MIB },
    undefined,
    { clock: systemClock, random: systemRandom, owner: currentIdentity() },
  );
});

afterEach(async () => {
  for (const s of running) await s.stop(0).catch(() => undefined);
  running.clear();
  await repo.close();
  await dir.remove();
});

interface Watched {
  readonly session: WatchSession;
  readonly events: WatchEvent[];
}

function watch(device: string, more: Partial<SessionOptions> = {}): Watched {
  const events: WatchEvent[] = [];
  const session = startSession({
    device,
    repo,
    host: 'host',
    stateDir: dir.join('state'),
    workers: 0,
    intervalMs: 200,
    probeMs: 50,
    onEvent: (e) => void events.push(e),
    ...more,
  });
  running.add(session);
  session.done.catch(() => undefined);
  return { session, events };
}

async function until(is: () => boolean, what: string): Promise<void> {
  for (let i = 0; !is(); i++) {
    if (i > 6000) throw new Error(`waited in vain for ${what}`);
    await systemClock.sleep(10);
  }
}

/** Attaches a file to this very device, as soon as whoever has it (a test beside this one, or the last reader of what was there) lets go. */
async function attachTo(device: string, file: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      await runTool('losetup', device, file);
      return;
    } catch (error) {
      if (tries > 1200) throw error;
      await systemClock.sleep(100);
    }
  }
}

/** Unmounts as soon as a freeze that is under way, which has it open for a moment, lets go. */
async function unmounted(mount: Mount): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      return await mount.unmount();
    } catch (error) {
      if (tries > 400 || !String(error).includes('busy')) throw error;
      await systemClock.sleep(50);
    }
  }
}

/** What lies under a loop device now; undefined: nothing. */
function backingFile(device: string): string | undefined {
  try {
    return readFileSync(`/sys/block/${path.basename(device)}/loop/backing_file`, 'utf8').trim();
  } catch {
    return undefined;
  }
}

const said = (w: Watched): string =>
  w.events
    .map((e) => (e.type === 'notice' || e.type === 'state' ? e.message : ''))
    .concat(w.events.map((e) => (e.type === 'problem' ? e.problem.message : '')))
    .join('\n');

const states = (w: Watched): string[] =>
  w.events.flatMap((e) => (e.type === 'state' ? [e.state] : []));

/** Restores a point to a file and compares it with the device. */
async function expectRestored(volumeName: string, seq: number, device: string): Promise<void> {
  const volume = (await listVolumes(repo, () => undefined)).find((v) => v.name === volumeName);
  if (volume === undefined) throw new Error(`there is no volume ${volumeName}`);
  const history = await VolumeHistory.open(repo, volume.id);
  try {
    const image = await openImage(history, volume, seq);
    const bytes = Buffer.alloc(image.sizeBytes);
    await image.read(bytes, 0);
    const file = dir.join(`restored-${seq}`);
    writeFileSync(file, bytes);
    tool('cmp', [file, device]);
  } finally {
    await history.close();
  }
}

async function coverages(volumeName: string): Promise<Coverage[]> {
  const volume = (await listVolumes(repo, () => undefined)).find((v) => v.name === volumeName);
  const history = await VolumeHistory.open(repo, volume?.id ?? '');
  try {
    const list: Coverage[] = [];
    for await (const c of new Timeline(history.sources).list()) list.push(c.coverage);
    return list;
  } finally {
    await history.close();
  }
}

const crash = { pointClass: PointClass.crash };
const nameOf = (device: string): string => `host/${path.basename(device)}`;

describe('a session on a loop device', () => {
  const t = requires(NEEDS);

  t.it('captures what is written, and restores it bit for bit', async () => {
    const loop = await newLoop(dir, 'disk.img', 48 * MIB);
    pokeWithDd(loop.device, 5 * MIB, noise(1, 3 * MIB));
    const w = watch(loop.device, { workers: 2 });
    await w.session.ready;
    expect(w.session.status().source).toMatchObject({ kind: 'trace', isFallback: false });
    for (let i = 0; i < 5; i++) {
      pokeWithDd(loop.device, i * 7 * MIB + 4096 * i, noise(10 + i, 200_704));
      const point = await w.session.point(crash);
      await expectRestored(nameOf(loop.device), point.seq, loop.device);
    }
    await w.session.stop(5000);
    const list = await coverages(nameOf(loop.device));
    expect(list[0]).toBe(Coverage.unknown);
    expect(list.slice(1)).not.toContain(Coverage.unknown);
  });

  t.it('begins without reading after a clean stop, and reads after a write', async () => {
    const loop = await newLoop(dir, 'disk.img', 32 * MIB);
    pokeWithDd(loop.device, MIB, noise(1, 5 * MIB));
    const first = watch(loop.device);
    await first.session.ready;
    pokeWithDd(loop.device, 9 * MIB, noise(2, 65_536));
    await first.session.stop(5000);

    const second = watch(loop.device);
    await second.session.ready;
    expect(said(second)).toContain('it need not be read');
    expect(states(second)).toEqual(['exact']);
    const unread = second.session.status().lastPoint;
    expect(unread).toMatchObject({ coverage: Coverage.exact, blocks: 0 });
    await expectRestored(nameOf(loop.device), unread?.seq ?? 0, loop.device);
    pokeWithDd(loop.device, 11 * MIB, noise(3, 65_536));
    const point = await second.session.point(crash);
    await second.session.stop(5000);
    await expectRestored(nameOf(loop.device), point.seq, loop.device);

    // Nobody watches.
    pokeWithDd(loop.device, 13 * MIB, noise(4, 4096));
    const third = watch(loop.device);
    await third.session.ready;
    expect(said(third)).toContain('it was written');
    expect(states(third)[0]).toBe('resync');
    const compared = third.session.status().lastPoint;
    expect(compared?.coverage).toBe(Coverage.unknown);
    await expectRestored(nameOf(loop.device), compared?.seq ?? 0, loop.device);
    await third.session.stop(5000);

    // Around the device, into the file behind it.
    pokeWithDd(loop.file, 14 * MIB, noise(5, 4096));
    tool('blockdev', ['--flushbufs', loop.device]);
    const fourth = watch(loop.device);
    await fourth.session.ready;
    expect(said(fourth)).not.toContain('need not be read');
    await expectRestored(
      nameOf(loop.device),
      fourth.session.status().lastPoint?.seq ?? 0,
      loop.device,
    );
  });

  t.it('is not fooled by a write in the moment of the stop', async () => {
    const loop = await newLoop(dir, 'disk.img', 16 * MIB);
    const data = dir.join('data');
    writeFileSync(data, noise(1, MIB));
    for (let round = 0; round < ROUNDS; round++) {
      const w = watch(loop.device);
      await w.session.ready;
      // Every other time the writes go on until the stop is over, however long that takes; else it may come in the middle, or after them.
      const isLong = round % 2 === 0;
      const over = dir.join(`over-${round}`);
      const writing = runTool(
        'sh',
        '-c',
        `i=0; while [ $i -lt 16 ] || { ${isLong} && [ ! -e "$2" ]; }; do
           i=$((i + 1))
           dd if="$0" of="$1" bs=4096 count=2 skip=$((i % 16 * 3 + ${round})) seek=$((i % 16 * 211 + ${round * 17})) \
             oflag=direct conv=notrunc status=none
         done
         dd if="$0" of="$1" bs=4096 count=1 skip=${200 + (round % 50)} oflag=direct conv=notrunc status=none`,
        data,
        loop.device,
        over,
      );
      await systemClock.sleep(5 + ((round * 13) % 60));
      await w.session.stop(isLong ? 500 : 5000);
      writeFileSync(over, '');
      await writing;
      const next = watch(loop.device);
      await next.session.ready;
      const { lastPoint } = next.session.status();
      if (isLong) expect(lastPoint?.coverage).toBe(Coverage.unknown);
      await next.session.stop(5000);
      await expectRestored(nameOf(loop.device), lastPoint?.seq ?? 0, loop.device);
    }
  });

  t.it('compares after the machine was started anew', async () => {
    const loop = await newLoop(dir, 'disk.img', 16 * MIB);
    const proc = dir.join('proc');
    mkdirSync(path.join(proc, 'sys/kernel/random'), { recursive: true });
    mkdirSync(path.join(proc, 'self'));
    writeFileSync(path.join(proc, 'self/mountinfo'), readFileSync('/proc/self/mountinfo'));
    const boot = (id: string): void =>
      writeFileSync(path.join(proc, 'sys/kernel/random/boot_id'), id);
    const roots = { sys: '/sys', proc, dev: '/dev' };
    boot('one');
    const first = watch(loop.device, { roots });
    await first.session.ready;
    await first.session.stop(5000);
    boot('two');
    const second = watch(loop.device, { roots });
    await second.session.ready;
    expect(said(second)).toContain('the machine was started anew since b2 stopped');
    expect(second.session.status().lastPoint?.coverage).toBe(Coverage.unknown);
    await second.session.stop(5000);
    const third = watch(loop.device, { roots });
    await third.session.ready;
    expect(said(third)).toContain('it need not be read');
  });

  t.it('follows the device when it grows and shrinks', async () => {
    const loop = await newLoop(dir, 'disk.img', 24 * MIB + 512);
    pokeWithDd(loop.device, 20 * MIB, noise(1, 4 * MIB));
    const w = watch(loop.device);
    await w.session.ready;
    for (const bytes of [40 * MIB + 1024, 22 * MIB, 30 * MIB]) {
      truncateSync(loop.file, bytes);
      tool('losetup', ['-c', loop.device]);
      await until(
        () => w.session.status().sizeBytes === bytes && w.session.status().state === 'exact',
        `the size ${bytes}`,
      );
      pokeWithDd(loop.device, bytes - 65_536, noise(bytes, 65_536));
      const point = await w.session.point(crash);
      await expectRestored(nameOf(loop.device), point.seq, loop.device);
    }
    expect(w.session.status().losses).toBeGreaterThanOrEqual(3);
    await w.session.stop(5000);
    expect(said(w)).toContain('capture goes on with the new size');
  });

  t.it('waits for a device that was detached, and takes no other for it', async () => {
    const file = sparseFile(dir, 'disk.img', 16 * MIB);
    const loop = await attachLoop(dir, file);
    await makeFileSystem('ext4', loop.device);
    const w = watch(loop.device);
    await w.session.ready;
    const before = w.session.status().points;

    await loop.detach();
    await until(() => w.session.status().state === 'absent', 'absence');
    // It is really let go.
    await until(() => backingFile(loop.device) !== file, 'the detach');
    const other = sparseFile(dir, 'other.img', 16 * MIB);
    await makeFileSystem('ext4', other);
    await attachTo(loop.device, other);
    await until(() => said(w).includes('is not the one that was captured'), 'the refusal');
    expect(w.session.status()).toMatchObject({ state: 'absent', points: before });
    await runTool('losetup', '--detach', loop.device);

    pokeWithDd(file, 8 * MIB, noise(7, 65_536));
    await attachTo(loop.device, file);
    await until(() => w.session.status().state === 'exact', 'exact again');
    const point = await w.session.point(crash);
    await expectRestored(nameOf(loop.device), point.seq, loop.device);
    expect(await coverages(nameOf(loop.device))).toEqual([Coverage.unknown, Coverage.unknown]);
    await w.session.stop(5000);

    // Stopped, the other one comes under the same name.
    await runTool('losetup', '--detach', loop.device);
    await attachTo(loop.device, other);
    const wrong = watch(loop.device);
    await expect(wrong.session.done).rejects.toMatchObject({
      kind: 'refused',
      message: expect.stringContaining('file system UUID') as string,
    });
  });

  t.it('outlives the repository being away', async () => {
    const loop = await newLoop(dir, 'disk.img', 16 * MIB);
    const w = watch(loop.device);
    await w.session.ready;
    const { url } = repo.store;
    renameSync(url, `${url}-away`);
    pokeWithDd(loop.device, MIB, noise(1, MIB));
    await until(() => w.session.status().state === 'outage', 'the outage');
    // What is made in its place is not taken for it.
    mkdirSync(url);
    pokeWithDd(loop.device, 4 * MIB, noise(2, MIB));
    await systemClock.sleep(300);
    expect(readdirSync(url)).toEqual([]);
    rmdirSync(url);
    expect(w.session.status().lagMs).toBeGreaterThan(0);
    renameSync(`${url}-away`, url);
    await until(() => w.session.status().state === 'exact', 'exact again');
    const point = await w.session.point(crash);
    await w.session.stop(5000);
    await expectRestored(nameOf(loop.device), point.seq, loop.device);
    expect(await coverages(nameOf(loop.device))).toContain(Coverage.coalesced);
  });

  requires({ ...NEEDS, tools: [...(NEEDS.tools ?? []), 'mkfs.ext4', 'xfs_io'] }).it(
    'goes on when the disk of the repository was pulled out and comes back as another device',
    async () => {
      const place = dir.join('mnt');
      const mount = (device: string): Promise<Mount> => mountDevice(dir, device, 'mnt');
      const first = await newLoop(dir, 'backup.img', 96 * MIB);
      await makeFileSystem('ext4', first.device);
      const mounted = await mount(first.device);
      const away = await Repository.init(
        await openStore(place, { create: true }),
        { encryption: 'none', chunkBytes: 65_536, packBytes: 4 * MIB },
        undefined,
        { clock: systemClock, random: systemRandom, owner: currentIdentity() },
      );
      const original = repo;
      repo = away;
      try {
        const loop = await newLoop(dir, 'disk.img', 16 * MIB);
        const w = watch(loop.device);
        await w.session.ready;
        pokeWithDd(loop.device, MIB, noise(1, MIB));
        const acknowledged = await w.session.point(crash);
        const image = dir.join('then.img');
        tool('cp', ['--sparse=always', loop.device, image]);
        const { dev } = statSync(place);

        // Nothing reaches the disk any more, as after it was pulled out; what was synced is on it.
        tool('xfs_io', ['-x', '-c', 'shutdown', place]);
        tool('cp', ['--sparse=always', first.file, dir.join('replugged.img')]);
        await mounted.unmount('--lazy');
        pokeWithDd(loop.device, 4 * MIB, noise(2, MIB));
        await until(() => w.session.status().state === 'outage', 'the outage');
        pokeWithDd(loop.device, 6 * MIB, noise(3, MIB));
        // Tried again meanwhile, and not into the empty mount point.
        await systemClock.sleep(2500);
        expect(w.session.status().state).toBe('outage');
        expect(readdirSync(place)).toEqual([]);

        const second = await attachLoop(dir, dir.join('replugged.img'));
        await mount(second.device);
        expect(statSync(place).dev).not.toBe(dev);
        await until(() => w.session.status().state === 'exact', 'exact again');
        expect(said(w)).toMatch(/takes commits of .* again/);
        const point = await w.session.point(crash);
        expect(point.seq).toBeGreaterThan(acknowledged.seq);
        await w.session.stop(5000);
        await expectRestored(nameOf(loop.device), point.seq, loop.device);
        await expectRestored(nameOf(loop.device), acknowledged.seq, image);
      } finally {
        for (const s of running) await s.stop(0).catch(() => undefined);
        running.clear();
        repo = original;
        await away.close();
      }
    },
  );

  t.it(
    'compares everything with an older copy of the repository that is put in its place',
    async () => {
      const loop = await newLoop(dir, 'disk.img', 16 * MIB);
      const w = watch(loop.device);
      await w.session.ready;
      const { url } = repo.store;
      tool('cp', ['-a', url, `${url}-old`]);
      pokeWithDd(loop.device, MIB, noise(1, 4 * MIB));
      const point = await w.session.point(crash);
      renameSync(url, `${url}-away`);
      pokeWithDd(loop.device, 8 * MIB, noise(2, MIB));
      await until(() => w.session.status().state === 'outage', 'the outage');
      renameSync(`${url}-old`, url);
      const error = await w.session.done.catch((e: unknown) => e);
      expect(error).toMatchObject({ kind: 'lost-claim', retryable: true });
      expect((error as Error).message).toContain(`#${point.seq} was there`);
      // As the daemon does it.
      const next = watch(loop.device);
      await next.session.ready;
      const compared = await next.session.point(crash);
      await next.session.stop(5000);
      await expectRestored(nameOf(loop.device), compared.seq, loop.device);
    },
  );

  t.it('captures a partition alone', async () => {
    const loop = await newLoop(dir, 'disk.img', 64 * MIB);
    tool(
      'sfdisk',
      ['-q', loop.device],
      'label: gpt\nstart=2048,size=32768\nstart=36864,size=40960\n',
    );
    const [one = '', two = ''] = addPartitions(dir, loop.device, 2);
    pokeWithDd(two, MIB, noise(1, MIB));
    const w = watch(two);
    await w.session.ready;
    pokeWithDd(one, MIB, noise(2, MIB));
    pokeWithDd(two, 3 * MIB, noise(3, 65_536));
    const point = await w.session.point(crash);
    expect(point.blocks).toBeLessThanOrEqual(16);
    await w.session.stop(5000);
    await expectRestored(nameOf(two), point.seq, two);
    const again = watch(two);
    await again.session.ready;
    expect(said(again)).toContain('it need not be read');
    await again.session.stop(5000);
    // A write to its neighbour counts as one to the disk: it is compared for nothing, and nothing is believed that is not certain.
    pokeWithDd(one, 2 * MIB, noise(4, 4096));
    const third = watch(two);
    await third.session.ready;
    expect(said(third)).toContain('has to be compared');
  });

  t.it('will not watch a device that holds the repository', async () => {
    const loop = await newLoop(dir, 'disk.img', 64 * MIB);
    tool(
      'sfdisk',
      ['-q', loop.device],
      'label: gpt\nstart=2048,size=65536\nstart=69632,size=32768\n',
    );
    const [one = '', two = ''] = addPartitions(dir, loop.device, 2);
    await makeFileSystem('ext4', one);
    const mounted = await mountDevice(dir, one, 'mnt');
    const inside = await Repository.init(
      await openStore(path.join(mounted.path, 'repo'), { create: true }),
      { encryption: 'none', chunkBytes: 65_536, packBytes: MIB },
      undefined,
      { clock: systemClock, random: systemRandom, owner: currentIdentity() },
    );
    try {
      for (const device of [loop.device, one]) {
        await expect(watch(device, { repo: inside }).session.done).rejects.toMatchObject({
          kind: 'refused',
          message: expect.stringContaining(`lies on ${device} itself`) as string,
        });
      }
      const beside = watch(two, { repo: inside });
      await beside.session.ready;
      expect(said(beside)).toContain(`is on the same disk as ${two}`);
      pokeWithDd(two, MIB, noise(3, 65_536));
      await beside.session.point(crash);
      await beside.session.stop(5000);
    } finally {
      await inside.close();
    }
  });

  t.it('captures an image file by scanning, and believes its times', async () => {
    const file = sparseFile(dir, 'vm.img', 8 * MIB);
    pokeWithDd(file, MIB, noise(1, MIB));
    const name = `host${file}`;
    const w = watch(file);
    await w.session.ready;
    expect(w.session.status().source).toMatchObject({ kind: 'scan' });
    pokeWithDd(file, 3 * MIB, noise(2, 65_536));
    const point = await w.session.point(crash);
    await expectRestored(name, point.seq, file);
    await w.session.stop(5000);
    const second = watch(file);
    await second.session.ready;
    expect(said(second)).toContain('it need not be read');
    truncateSync(file, 10 * MIB);
    await until(() => second.session.status().sizeBytes === 10 * MIB, 'the new size');
    await until(() => second.session.status().state === 'exact', 'exact again');
    const grown = await second.session.point(crash);
    await expectRestored(name, grown.seq, file);
    await second.session.stop(5000);
    pokeWithDd(file, 5 * MIB, noise(3, 4096));
    const third = watch(file);
    await third.session.ready;
    expect(said(third)).toContain('has to be compared');
    await expectRestored(name, third.session.status().lastPoint?.seq ?? 0, file);
  });
});

describe('writers that never pause on a mounted file system', () => {
  // A machine with much else to do needs more than the usual 100 ms for what fits into them otherwise.
  const BOUND_MS = 3000;
  requires({ ...NEEDS, tools: [...(NEEDS.tools ?? []), 'fio'] }).it(
    'are held where that is allowed, for no longer than the bound, and never otherwise',
    async () => {
      const { device } = await newLoop(dir, 'busy.img', 128 * MIB);
      await makeFileSystem('ext4', device);
      const mounted: Mount = await mountDevice(dir, device, 'mnt');
      const quiescer = new Quiescer({
        clock: systemClock,
        repositoryPath: dir.join('repo'),
        boundMs: BOUND_MS,
        staleDir: dir.join('frozen'),
      });
      let isAllowed = false;
      const w = watch(device, {
        freezeAfterMs: () => (isAllowed ? 300 : undefined),
        quiesce: async ({ signal }, at) =>
          (await quiescer.point({ pointClass: PointClass.fs, signal }, { ...at, volume: 'v' }))
            .point,
      });
      await w.session.ready;
      const load = spawn('fio', [
        `--directory=${mounted.path}`,
        ...'--name=w --size=16M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio'.split(' '),
        // As long as a machine with much else to do may take for what follows.
        ...'--iodepth=8 --numjobs=2 --time_based --runtime=240'.split(' '),
      ]);
      const ended = new Promise((resolve) => load.on('exit', resolve));
      try {
        await until(() => (w.session.status().lagMs ?? 0) > 1000, 'writes that outrun the reader');
        expect(w.session.status().freezes.count).toBe(0);
        const { points } = w.session.status();
        isAllowed = true;
        const frozen = (): { readonly frozenMs: number; readonly unasked: boolean }[] =>
          w.events.flatMap((e) => (e.type === 'frozen' ? [e] : []));
        await until(() => frozen().length > 0, 'a freeze');
        await until(() => w.session.status().points > points || load.exitCode !== null, 'a point');
        expect(load.exitCode).toBeNull();
        expect(frozen().every((f) => f.unasked)).toBe(true);
        const longest = Math.max(...frozen().map((f) => f.frozenMs));
        process.stderr.write(`frozen ${frozen().length} times, at most ${longest.toFixed(1)} ms\n`);
        expect(w.session.status().freezes).toEqual({ count: frozen().length, longestMs: longest });
        // How late a processor is to be had is not ours; that it is a multiple of the bound would be.
        expect(longest).toBeLessThan(2 * BOUND_MS);
      } finally {
        isAllowed = false;
        load.kill('SIGINT');
        await ended;
      }
      const last = await w.session.point({ pointClass: PointClass.crash });
      await unmounted(mounted);
      const after = await w.session.point({ pointClass: PointClass.crash });
      expect(after.seq).toBeGreaterThanOrEqual(last.seq);
      await w.session.stop(2000);
      await quiescer.close();
      await expectRestored('host/' + path.basename(device), after.seq, device);
    },
  );
});

describe('a medium with blocks that cannot be read', () => {
  for (const source of ['auto', 'scan'] as const) {
    requires(NEEDS).it(
      `is captured but for those, and wholly when they can be read again (${source})`,
      async () => {
        const file = dir.join('disk.img');
        writeFileSync(file, noise(5, 8 * MIB));
        const { device } = await attachLoop(dir, file);
        // Behind its end the loop device gives real errors.
        truncateSync(file, 6 * MIB);
        const w = watch(device, { source, badRetryMs: 200, workers: 1 });
        await until(() => w.session.status().state === 'unreadable', 'the state');
        expect(w.session.status()).toMatchObject({
          lagMs: undefined,
          unreadable: { bytes: 2 * MIB, ranges: [{ offset: 6 * MIB, length: 2 * MIB }] },
        });
        await until(() => w.session.status().lastPoint !== undefined, 'a point');
        expect(w.session.status().lastPoint?.pointClass).toBe(PointClass.fuzzy);
        pokeWithDd(device, 4096 * 100, noise(6, 4096));
        await expect(w.session.point({ pointClass: PointClass.crash })).rejects.toThrow(
          `${2 * MIB} bytes of it cannot be read`,
        );
        expect(said(w)).toContain('2.0 MiB of');
        truncateSync(file, 8 * MIB);
        await until(() => w.session.status().state === 'exact', 'exact points');
        const { seq } = await w.session.point({ pointClass: PointClass.crash });
        await w.session.stop(2000);
        await expectRestored(`host/${path.basename(device)}`, seq, device);
      },
      60_000,
    );
  }
});
