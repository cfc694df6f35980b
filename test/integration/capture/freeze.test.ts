/**
 * Real file systems, really frozen: what a point made meanwhile holds, that nothing stays frozen whoever is killed or stopped, and
 * what is refused.
 */
import { execFile, spawn, spawnSync, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { open, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { promisify } from 'node:util';
import { describe, expect } from 'vitest';
import { Freezer, thawStale } from '../../../src/capture/freeze/freezer.js';
import { mountsOf, type WatchedMount } from '../../../src/capture/freeze/mounts.js';
import { quiescedPoint } from '../../../src/capture/freeze/quiesced-point.js';
import {
  LiveCapture,
  type CaptureCommit,
  type CaptureSink,
} from '../../../src/capture/live-capture.js';
import { systemClock } from '../../../src/clock.js';
import { openReadDevice } from '../../../src/devices/open.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import { TraceSource } from '../../../src/devices/trace/source.js';
import { errnoOf } from '../../../src/errors.js';
import { PointClass } from '../../../src/format/commit.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { freezeFs, thawFs } from '../../../src/syscalls.js';
import { DISK_NEEDS, addPartitions, tool } from '../../support/disks.js';
import {
  LOOP_NEEDS,
  attachLoop,
  makeFileSystem,
  makerOf,
  mountDevice,
  newLoop,
  sparseFile,
  type FileSystem,
} from '../../support/loop.js';
import { requires, type Needs } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MiB = 1024 * 1024;
const BLOCK = 4096;
/** mkfs.xfs makes none below 300 MiB. */
const SIZES: Readonly<Partial<Record<FileSystem, number>>> = { xfs: 320 * MiB, btrfs: 128 * MiB };
const NEEDS: Needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.ext4', 'dd', 'cmp', 'dumpe2fs'],
  paths: [TRACEFS, '/dev/loop-control'],
};

/** Keeps the newest state in a file. */
class FileSink implements CaptureSink {
  readonly classes: PointClass[] = [];
  private readonly fd: number;
  private seq = 0;

  constructor(file: string, sizeBytes: number) {
    this.fd = openSync(file, 'w');
    ftruncateSync(this.fd, sizeBytes);
  }

  commit(commit: CaptureCommit): Promise<{ seq: number; storedBytes: number }> {
    const { content } = commit;
    content.blocks.forEach((block, i) =>
      writeSync(this.fd, content.bytesAt(i), 0, undefined, block * BLOCK),
    );
    this.classes.push(commit.pointClass);
    return Promise.resolve({ seq: ++this.seq, storedBytes: 0 });
  }

  close(): void {
    closeSync(this.fd);
  }
}

interface Bed {
  readonly device: Awaited<ReturnType<typeof openReadDevice>>;
  readonly capture: LiveCapture;
  readonly sink: FileSink;
  /** What the newest point holds. */
  readonly image: string;
  readonly mountPoint: string;
  [Symbol.asyncDispose](): Promise<void>;
}

async function bedOn(dir: TempDir, type: FileSystem): Promise<Bed> {
  const loop = await newLoop(dir, 'disk.img', SIZES[type] ?? 64 * MiB);
  await makeFileSystem(type, loop.device);
  const mount = await mountDevice(dir, loop.device, 'mnt');
  const device = await openReadDevice(loop.device);
  const source = await TraceSource.open(device.facts);
  const image = dir.join('image');
  const sink = new FileSink(image, device.facts.sizeBytes);
  const capture = LiveCapture.start({
    source,
    device,
    sink,
    clock: systemClock,
    intervalMs: 200,
    pollMs: 5,
  });
  return {
    device,
    capture,
    sink,
    image,
    mountPoint: mount.path,
    async [Symbol.asyncDispose]() {
      await capture.stop();
      await source.close();
      await device.close();
      sink.close();
    },
  };
}

/** Writes files in the directory, some synced, until it is ended. */
function load(directory: string): { end(): Promise<void> } {
  const child = spawn(
    'sh',
    [
      '-c',
      'i=0; while :; do i=$((i+1)); dd if=/dev/urandom of=f$((i%16)) bs=8k count=5 conv=fsync status=none; echo $i >>log; sleep 0.01; done',
    ],
    { cwd: directory, detached: true, stdio: 'ignore' },
  );
  const ended = once(child, 'exit');
  return {
    async end() {
      process.kill(-(child.pid ?? 0), 'SIGKILL');
      await ended;
    },
  };
}

/** True if the file system is frozen; it is not afterwards. */
async function wasFrozen(directory: string): Promise<boolean> {
  const file = await open(directory, 'r');
  try {
    await thawFs(file.fd);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'EINVAL') return false;
    throw error;
  } finally {
    await file.close();
  }
}

/** Resolves once something can be written there. A file system that stays frozen is thawed for the sake of the machine: that fails. */
async function writable(directory: string): Promise<void> {
  const file = path.join(directory, 'probe');
  const over = new AbortController();
  const stuck = systemClock.sleep(20_000, over.signal).then(async () => {
    if (!over.signal.aborted && (await wasFrozen(directory)))
      throw new Error(`${directory} stayed frozen`);
  });
  await Promise.all([writeFile(file, 'x', { flush: true }).finally(() => over.abort()), stuck]);
  await rm(file);
}

describe('a frozen file system', () => {
  for (const type of ['ext4', 'xfs', 'btrfs'] as const) {
    requires({ ...NEEDS, tools: [...(NEEDS.tools ?? []), makerOf(type)] }).it(
      `(${type}) is in the point as it is on the device, under load`,
      async () => {
        await using dir = tempDir();
        await using bed = await bedOn(dir, type);
        const { capture, device } = bed;
        const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
        const writer = load(bed.mountPoint);
        try {
          const mounts = await mountsOf(device.facts);
          expect(mounts).toMatchObject([
            { mountPoint: bed.mountPoint, fsType: type, holding: 'freeze', why: undefined },
          ]);
          await capture.point();
          for (let round = 0; round < 2; round++) {
            await systemClock.sleep(150);
            // The bound is for the comparison, which reads the whole device.
            const frozen = await freezer.freeze(mounts, 60_000);
            const copy = dir.join('copy');
            const point = await capture.point(PointClass.fs, undefined, async () => {
              tool('dd', [
                `if=${device.facts.path}`,
                `of=${copy}`,
                'bs=4M',
                'iflag=direct',
                'conv=sparse',
                'status=none',
              ]);
              return (await frozen.thaw()).held;
            });
            expect(point.pointClass).toBe(PointClass.fs);
            expect(bed.sink.classes.at(-1)).toBe(PointClass.fs);
            await promisify(execFile)('truncate', ['-s', String(device.facts.sizeBytes), copy]);
            // The next point may be under way: so the capture writes nothing while the two are compared.
            expect(tool('cmp', [copy, bed.image])).toBe('');
            if (type === 'ext4')
              expect(tool('dumpe2fs', ['-h', copy])).not.toMatch(/needs_recovery/);
            expect(await frozen.thaw()).toMatchObject({ held: true, why: undefined });
          }
        } finally {
          await writer.end();
          await freezer.close();
        }
        expect(await wasFrozen(bed.mountPoint)).toBe(false);
        expect(readdirSync(dir.join('stale'))).toEqual([]);
      },
      60_000,
    );
  }

  requires(NEEDS).it('gives a point of class fs, with everything synced before', async () => {
    await using dir = tempDir();
    await using bed = await bedOn(dir, 'ext4');
    const { capture, device } = bed;
    const writer = load(bed.mountPoint);
    try {
      const mounts = await mountsOf(device.facts);
      const made = await quiescedPoint(capture, mounts, {
        clock: systemClock,
        device: device.facts,
        volume: 'host/disk',
        pointClass: PointClass.fs,
        boundMs: 2000,
        staleDir: dir.join('stale'),
      });
      expect(made.point.pointClass).toBe(PointClass.fs);
      expect(bed.sink.classes).toContain(PointClass.fs);
      expect(made.frozen).toEqual([bed.mountPoint]);
      expect(made.frozenMs).toBeGreaterThan(0);
      process.stderr.write(`frozen for ${made.frozenMs.toFixed(1)} ms under load\n`);
    } finally {
      await writer.end();
    }
    expect(await wasFrozen(bed.mountPoint)).toBe(false);
  });

  requires(NEEDS).it('that somebody else thaws is in no point of class fs', async () => {
    await using dir = tempDir();
    await using bed = await bedOn(dir, 'ext4');
    const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
    try {
      const mounts = await mountsOf(bed.device.facts);
      await bed.capture.point();
      const interfering = {
        isUsable: true,
        freeze: async (...args: Parameters<Freezer['freeze']>) => {
          const frozen = await freezer.freeze(...args);
          expect(await wasFrozen(bed.mountPoint)).toBe(true);
          return frozen;
        },
      };
      await expect(
        quiescedPoint(bed.capture, mounts, {
          clock: systemClock,
          device: bed.device.facts,
          volume: 'v',
          pointClass: PointClass.fs,
          boundMs: 1000,
          freezer: interfering,
        }),
      ).rejects.toThrow(/did not stay frozen: .* was thawed by somebody else/);
      expect(bed.sink.classes).not.toContain(PointClass.fs);
    } finally {
      await freezer.close();
    }
  });

  requires(NEEDS).it('is thawed at the bound, and then nothing is claimed', async () => {
    await using dir = tempDir();
    await using bed = await bedOn(dir, 'ext4');
    const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
    try {
      const frozen = await freezer.freeze(await mountsOf(bed.device.facts), 400);
      await writable(bed.mountPoint);
      const thawed = await frozen.thaw();
      expect(thawed).toMatchObject({ held: false, why: 'the bound of 400 ms was over' });
      process.stderr.write(`thawed by the helper after ${thawed.frozenMs.toFixed(1)} of 400 ms\n`);
      // The helper goes on.
      const again = await freezer.freeze(await mountsOf(bed.device.facts), 5000);
      expect(await again.thaw()).toMatchObject({ held: true });
    } finally {
      await freezer.close();
    }
    await writable(bed.mountPoint);
  });

  requires(NEEDS).it('that is frozen already, by another, is left alone', async () => {
    await using dir = tempDir();
    await using bed = await bedOn(dir, 'ext4');
    const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
    const file = await open(bed.mountPoint, 'r');
    try {
      await freezeFs(file.fd);
      await expect(freezer.freeze(await mountsOf(bed.device.facts), 5000)).rejects.toMatchObject({
        message: expect.stringMatching(/cannot freeze ext4 on .*EBUSY/) as string,
        retryable: true,
      });
      expect(await wasFrozen(bed.mountPoint)).toBe(true);
    } finally {
      await file.close();
      await freezer.close();
    }
  });
});

/** Freezes the mounts of a device, says so, and then waits or spins. Runs the built program. */
const FREEZING = `
const [root, device, staleDir, boundMs, then] = process.argv.slice(1);
const { Freezer, mountsOf } = await import(root + '/dist/capture/freeze/index.js');
const { systemClock } = await import(root + '/dist/clock.js');
const { openReadDevice } = await import(root + '/dist/devices/open.js');
const opened = await openReadDevice(device);
const mounts = await mountsOf(opened.facts);
const freezer = await Freezer.start({ clock: systemClock, staleDir });
await freezer.freeze(mounts, Number(boundMs));
await new Promise((done) => process.stdout.write('frozen ' + freezer.pid + '\\n', done));
// Not for ever, should the test die.
const end = Date.now() + 120_000;
while (then === 'hang' && Date.now() < end);
setTimeout(() => process.exit(1), 120_000);
`;

interface Freezing {
  readonly child: ChildProcess;
  readonly helper: number;
  readonly ended: Promise<unknown>;
}

async function freezing(
  dir: TempDir,
  device: string,
  boundMs: number,
  afterwards: 'wait' | 'hang',
): Promise<Freezing> {
  const root = path.resolve(import.meta.dirname, '../../..');
  const child = spawn(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      FREEZING,
      root,
      device,
      dir.join('stale'),
      String(boundMs),
      afterwards,
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const ended = once(child, 'exit');
  const [text] = (await Promise.race([
    once(child.stdout, 'data'),
    ended.then(() => ['it ended']),
  ])) as [unknown];
  const pid = /^frozen (\d+)/.exec(String(text))?.[1];
  if (pid === undefined) throw new Error(`no freeze: ${String(text)}`);
  return { child, helper: Number(pid), ended };
}

describe('a freeze that the kernel takes long for', () => {
  requires(NEEDS).it(
    'is over as soon as the kernel is, is refused, and the next one works',
    async () => {
      await using dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', 512 * MiB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      const device = await openReadDevice(loop.device);
      const mounts = await mountsOf(device.facts);
      const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
      try {
        // What is not synced yet is synced by the freeze itself, with the writers held: 300 MiB in 20 ms is out of reach.
        const file = await open(path.join(mount.path, 'large'), 'w');
        await file.write(Buffer.alloc(300 * MiB, 0x5a));
        const slow = await freezer.freeze(mounts, 20).then(
          () => undefined,
          (error: unknown) => error,
        );
        expect(slow).toMatchObject({
          kind: 'failed',
          retryable: true,
          message: expect.stringContaining('freezing took too long: the bound of 20 ms was over'),
        });
        expect(freezer.isUsable).toBe(true);
        await writable(mount.path);
        expect(await wasFrozen(mount.path)).toBe(false);
        expect(readdirSync(dir.join('stale'))).toEqual([]);
        await file.close();
        tool('sync', ['-f', mount.path]);
        const frozen = await freezer.freeze(mounts, 10_000);
        expect(await frozen.thaw()).toMatchObject({ held: true });
        await writable(mount.path);
      } finally {
        await freezer.close();
        await device.close();
      }
    },
    60_000,
  );
});

describe('nothing stays frozen', () => {
  const LONG = 3_600_000;
  const cases: readonly {
    readonly name: string;
    readonly boundMs: number;
    readonly afterwards?: 'hang';
    readonly does: (f: Freezing) => void;
  }[] = [
    {
      name: 'when the process that asked is killed',
      boundMs: LONG,
      does: (f) => void f.child.kill('SIGKILL'),
    },
    {
      name: 'when it is stopped, as by a debugger',
      boundMs: 500,
      does: (f) => void f.child.kill('SIGSTOP'),
    },
    { name: 'when it hangs', boundMs: 500, afterwards: 'hang', does: () => undefined },
    {
      name: 'when the helper is killed and the process that asked has to thaw',
      boundMs: LONG,
      does: (f) => void process.kill(f.helper, 'SIGKILL'),
    },
    {
      name: 'when the helper is asked to end by SIGTERM and SIGINT, which it ignores, and then its parent goes',
      boundMs: LONG,
      does: (f) => {
        process.kill(f.helper, 'SIGTERM');
        process.kill(f.helper, 'SIGINT');
        f.child.kill('SIGKILL');
      },
    },
  ];
  for (const { name, boundMs, afterwards, does } of cases) {
    requires(NEEDS).it(name, async () => {
      await using dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', 32 * MiB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      const f = await freezing(dir, loop.device, boundMs, afterwards ?? 'wait');
      try {
        does(f);
        await writable(mount.path);
      } finally {
        f.child.kill('SIGKILL');
        await f.ended;
        await wasFrozen(mount.path);
      }
    });
  }

  requires(NEEDS).it('after the next start, where both were killed at one time', async () => {
    await using dir = tempDir();
    const loop = await newLoop(dir, 'disk.img', 32 * MiB);
    await makeFileSystem('ext4', loop.device);
    const mount = await mountDevice(dir, loop.device, 'mnt');
    const f = await freezing(dir, loop.device, LONG, 'wait');
    try {
      // Stopped first, so that neither hears of the other's end.
      process.kill(f.helper, 'SIGSTOP');
      expect(await thawStale(dir.join('stale'))).toEqual([]);
      f.child.kill('SIGKILL');
      await f.ended;
      process.kill(f.helper, 'SIGKILL');
      while (await isRunning(f.helper)) await systemClock.sleep(10);
      // Certainly dead only when the last of its threads is.
      await expect
        .poll(() => thawStale(dir.join('stale')), { timeout: 60_000 })
        .toEqual([mount.path]);
      await writable(mount.path);
      expect(await thawStale(dir.join('stale'))).toEqual([]);
      expect(readdirSync(dir.join('stale'))).toEqual([]);
    } finally {
      await wasFrozen(mount.path);
    }
  });

  requires(NEEDS).it('after the next start, whatever else the note names', async () => {
    await using dir = tempDir();
    const loop = await newLoop(dir, 'disk.img', 32 * MiB);
    await makeFileSystem('ext4', loop.device);
    const mount = await mountDevice(dir, loop.device, 'mnt');
    const dead = spawnSync('true').pid;
    const device = await openReadDevice(loop.device);
    const { openPath: place, devNumber } = (await mountsOf(device.facts))[0] as WatchedMount;
    await device.close();
    expect(place).toBe(mount.path);
    const note = {
      owner: { ...currentIdentity(), pid: dead, startTicks: '1' },
      targets: [
        { path: place, devNumber },
        { path: dir.join('unmounted'), devNumber },
      ],
    };
    mkdirSync(dir.join('stale'));
    writeFileSync(dir.join('stale', String(dead)), JSON.stringify(note));
    tool('fsfreeze', ['-f', mount.path]);
    try {
      expect(await thawStale(dir.join('stale'))).toEqual([mount.path]);
      await writable(mount.path);
      expect(readdirSync(dir.join('stale'))).toEqual([]);
    } finally {
      await wasFrozen(mount.path);
    }
  });

  requires({}).it(
    'never by taking the note of a running helper that is being written',
    async () => {
      await using dir = tempDir();
      const dead = spawnSync('true').pid;
      const torn = ['', '~'].map((end) => `${process.pid}${end}`);
      for (const name of [...torn, String(dead), `${dead}~`, 'else'])
        writeFileSync(dir.join(name), '{"owner":');
      expect(await thawStale(dir.path)).toEqual([]);
      expect(readdirSync(dir.path).toSorted()).toEqual([...torn, 'else'].toSorted());
    },
  );

  requires(NEEDS).it('when the helper is stopped: it is ended, and its parent thaws', async () => {
    await using dir = tempDir();
    await using bed = await bedOn(dir, 'ext4');
    const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
    const frozen = await freezer.freeze(await mountsOf(bed.device.facts), 100);
    process.kill(freezer.pid ?? 0, 'SIGSTOP');
    expect(await frozen.thaw()).toMatchObject({ held: false });
    expect(freezer.isUsable).toBe(false);
    await writable(bed.mountPoint);
    await freezer.close();
  });
});

async function isRunning(pid: number): Promise<boolean> {
  try {
    const { readFile } = await import('node:fs/promises');
    return !/^State:\s+[ZX]/m.test(await readFile(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

describe('what is mounted on a device', () => {
  requires({
    ...DISK_NEEDS,
    tools: [...(DISK_NEEDS.tools ?? []), 'mkfs.btrfs', 'btrfs'],
  }).it(
    'is found on its partitions, once for each file system, the last mounted first; with what must not be frozen',
    async () => {
      await using dir = tempDir();
      const loop = await attachLoop(dir, sparseFile(dir, 'disk', 400 * MiB));
      tool('sfdisk', ['-q', loop.device], 'label: gpt\nsize=64M\nsize=16M\nsize=160M\nsize=16M\n');
      const [ext4 = '', small = '', btrfs = '', unused = ''] = addPartitions(dir, loop.device, 4);
      await makeFileSystem('ext4', ext4);
      await makeFileSystem('ext4', small);
      await makeFileSystem('btrfs', btrfs);
      await makeFileSystem('ext4', unused);
      const root = await mountDevice(dir, ext4, 'root');
      const efi = await mountDevice(dir, small, 'efi');
      const data = await mountDevice(dir, btrfs, 'data');
      mkdirSync(dir.join('bind'));
      tool('mount', ['--bind', root.path, dir.join('bind')]);
      dir.onRemove(() => void tool('umount', [dir.join('bind')]));
      const device = await openReadDevice(loop.device);
      try {
        const { facts } = device;
        const short = async (
          options: Parameters<typeof mountsOf>[1] = {},
        ): Promise<readonly (readonly [string, string])[]> =>
          (await mountsOf(facts, options)).map((m) => [path.basename(m.mountPoint), m.holding]);
        expect(await short()).toEqual([
          ['data', 'freeze'],
          ['efi', 'freeze'],
          ['root', 'freeze'],
        ]);
        // The repository, in a subvolume (whose files have a device number of their own).
        tool('btrfs', ['subvolume', 'create', path.join(data.path, 'sub')]);
        mkdirSync(path.join(data.path, 'sub/repo'));
        const repositoryPath = path.join(data.path, 'sub/repo');
        const never = await mountsOf(facts, { repositoryPath });
        expect(never.map((m) => m.holding)).toEqual(['never', 'freeze', 'freeze']);
        expect(never[0]?.why).toBe(
          `it holds the repository ${repositoryPath}, which b2 writes while it works`,
        );
        // A place that this process writes, by a link.
        symlinkSync(root.path, dir.join('link'));
        expect(await short({ writes: [dir.join('link'), dir.join('missing')] })).toEqual([
          ['data', 'freeze'],
          ['efi', 'freeze'],
          ['root', 'never'],
        ]);
        // A repository on a loop device whose file lies on the file system.
        const inner = await attachLoop(dir, imageOn(root.path));
        await makeFileSystem('ext4', inner.device);
        const repo = await mountDevice(dir, inner.device, 'repo');
        expect(await short({ repositoryPath: repo.path })).toEqual([
          ['data', 'freeze'],
          ['efi', 'freeze'],
          ['root', 'never'],
        ]);
        await repo.unmount();
        await inner.detach();
        // A file that is open for writing: a log.
        const log = await open(path.join(efi.path, 'log'), 'a');
        expect(await short()).toEqual([
          ['data', 'freeze'],
          ['efi', 'never'],
          ['root', 'freeze'],
        ]);
        await log.close();
        expect((await short()).map(([, holding]) => holding)).not.toContain('never');
        const part = await openReadDevice(btrfs);
        expect((await mountsOf(part.facts)).map((m) => m.mountPoint)).toEqual([data.path]);
        await part.close();
      } finally {
        await device.close();
      }
    },
    60_000,
  );

  requires({ ...NEEDS, tools: [...(NEEDS.tools ?? []), 'sfdisk', 'partx'] }).it(
    'freezes what can be frozen, and takes what cannot along as long as nobody writes to it',
    async () => {
      await using dir = tempDir();
      const loop = await attachLoop(dir, sparseFile(dir, 'disk', 100 * MiB));
      tool('sfdisk', ['-q', loop.device], 'label: gpt\nsize=64M\nsize=16M\n');
      const [ext4 = '', small = ''] = addPartitions(dir, loop.device, 2);
      await makeFileSystem('ext4', ext4);
      await makeFileSystem('ext4', small);
      const root = await mountDevice(dir, ext4, 'root');
      const efi = await mountDevice(dir, small, 'efi');
      const device = await openReadDevice(loop.device);
      const source = await TraceSource.open(device.facts);
      const sink = new FileSink(dir.join('image'), device.facts.sizeBytes);
      const capture = LiveCapture.start({ source, device, sink, clock: systemClock, pollMs: 5 });
      const freezer = await Freezer.start({ clock: systemClock, staleDir: dir.join('stale') });
      // Not every kernel has FAT; any file system can be held the way that is for it.
      const mounts = async (): Promise<readonly WatchedMount[]> =>
        (await mountsOf(device.facts)).map((m) =>
          m.mountPoint === efi.path ? { ...m, holding: 'watch' } : m,
        );
      const options = {
        clock: systemClock,
        device: device.facts,
        volume: 'v',
        pointClass: PointClass.fs,
        boundMs: 2000,
      };
      try {
        const made = await quiescedPoint(capture, await mounts(), { ...options, freezer });
        expect(made).toMatchObject({ frozen: [root.path], stayedQuiet: [efi.path] });
        expect(made.point.pointClass).toBe(PointClass.fs);
        const count = sink.classes.filter((c) => c === PointClass.fs).length;
        const writing = {
          isUsable: true,
          freeze: async (...args: Parameters<Freezer['freeze']>) => {
            const frozen = await freezer.freeze(...args);
            await writeFile(path.join(efi.path, 'x'), 'y', { flush: true });
            return frozen;
          },
        };
        await expect(
          quiescedPoint(capture, await mounts(), { ...options, freezer: writing }),
        ).rejects.toThrow(`${efi.path} was written to, and cannot be frozen`);
        expect(sink.classes.filter((c) => c === PointClass.fs)).toHaveLength(count);
        await writable(root.path);
      } finally {
        await freezer.close();
        await capture.stop();
        await source.close();
        await device.close();
        sink.close();
      }
    },
    60_000,
  );
});

function imageOn(directory: string): string {
  const file = path.join(directory, 'inner');
  writeFileSync(file, '');
  const fd = openSync(file, 'r+');
  ftruncateSync(fd, 16 * MiB);
  closeSync(fd);
  return file;
}
