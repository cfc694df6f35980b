/**
 * What "done" means: real disks go through init, snapshot, change, snapshot and restore to a file, a block device and a
 * qcow2 image, and cmp finds nothing, for both points, encrypted and not. B2_E2E_FULL=1 fills the 4 GiB image.
 */
import { rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import type { InitResult } from '../../src/commands/run/init.js';
import type { PointsResult } from '../../src/commands/run/points.js';
import type { RestoreAnswer } from '../../src/commands/run/restore.js';
import type { SnapshotAnswer } from '../../src/commands/run/snapshot.js';
import { B2 } from '../support/b2.js';
import { DISK_NEEDS, addPartitions, noise, pokeWithDd, tool } from '../support/disks.js';
import { attachLoop, makeFileSystem, mountDevice, newLoop, sparseFile } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { cmp, cmpSparse, copySparse, fillWithFiles } from '../support/source.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const GIB = 1024 * MIB;
const CHUNK = 64 * KIB;
const FULL = process.env['B2_E2E_FULL'] === '1';
const NEEDS = {
  ...DISK_NEEDS,
  tools: [...(DISK_NEEDS.tools ?? []), 'qemu-img', 'cmp', 'e2fsck', 'blkdiscard', 'tar'],
};
const TEST_MS = FULL ? 1_800_000 : 300_000;

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

function newDir(): TempDir {
  const dir = tempDir();
  dirs.push(dir);
  return dir;
}

interface Encryption {
  readonly name: string;
  readonly init: readonly string[];
  readonly env: (dir: TempDir) => Readonly<Record<string, string>>;
}
const BY_PASSWORD: Encryption = {
  name: 'encrypted',
  init: [],
  env: () => ({ B2_PASSWORD: 'open sesame' }),
};
/** The same data, and each start half a second quicker than with a password. */
const ENCRYPTED: Encryption = {
  name: 'encrypted',
  init: [],
  env: (dir) => ({ B2_KEY_FILE: dir.join('key') }),
};
const PLAIN: Encryption = {
  name: 'not encrypted',
  init: ['--encryption', 'none'],
  env: () => ({}),
};

async function newRepository(dir: TempDir, how: Encryption): Promise<B2> {
  const b2 = new B2(dir, how.env(dir));
  const made = await b2.json<InitResult>(['init', ...how.init]);
  expect(made).toMatchObject({
    url: b2.repository,
    encryption: how === PLAIN ? 'none' : 'aes256-gcm',
  });
  return b2;
}

/** A disk to back up; `path` may be a file or a device, `file` always holds its bytes. */
interface Source {
  readonly path: string;
  readonly sizeBytes: number;
  /** Copies its bytes to a new file. */
  copy(to: string): void;
  /** Changes at most `most` bytes of it. */
  change(): Promise<{ readonly most: number }>;
  /** What must hold of a restored copy, beyond being the same. */
  check?(file: string): void;
}

async function ext4Image(dir: TempDir): Promise<Source> {
  const sizeBytes = 4 * GIB;
  const path = sparseFile(dir, 'server.img', sizeBytes);
  const mounted = async (name: string, work: (mnt: string) => void): Promise<void> => {
    const loop = await attachLoop(dir, path);
    if (name === 'first') await makeFileSystem('ext4', loop.device);
    const mount = await mountDevice(dir, loop.device, name);
    work(mount.path);
    await mount.unmount();
    await loop.detach();
  };
  await mounted('first', (mnt) => fillWithFiles(dir, mnt, FULL ? 3400 * MIB : 120 * MIB));
  return {
    path,
    sizeBytes,
    copy: (to) => copySparse(path, to),
    async change() {
      await mounted('second', (mnt) => {
        tool('sh', ['-c', 'rm -r "$0/usr/share/doc" "$0/photos/0001.jpg"', mnt]);
        tool('sh', [
          '-c',
          'cp -r "$0/usr/share/man" "$0/copied" 2>/dev/null || cp -r "$0/photos/0002.jpg" "$0/copied"',
          mnt,
        ]);
        pokeWithDd(join(mnt, 'photos/0003.jpg'), 100_000, noise(99, 50_000));
        writeFileSync(join(mnt, 'new'), noise(77, 5_000_000));
      });
      // Directories and inode tables of what was deleted, the journal, and what is new.
      return { most: 250 * MIB };
    },
    check: (file) => {
      expect(tool('e2fsck', ['-f', '-n', file])).toMatch(/non-contiguous/);
    },
  };
}

/** The second partition of a disk, with database-like contents: pages of data, of zeros, and of text. */
async function rawPartition(dir: TempDir): Promise<Source> {
  const disk = await newLoop(dir, 'disk', 160 * MIB);
  tool(
    'sfdisk',
    ['--quiet', disk.device],
    'label: gpt\nstart=2048,size=32768\nstart=34816,size=202002\n',
  );
  const [, path = ''] = addPartitions(dir, disk.device, 2);
  // In sectors of 512 bytes: not whole blocks of 4 KiB, and not whole chunks.
  const sizeBytes = 202_002 * 512;
  for (let at = 0, i = 0; at < 80 * MIB; at += 3 * MIB + 8 * KIB, i++)
    pokeWithDd(path, at, noise(i + 1, (i % 3) * MIB + 12 * KIB));
  return {
    path,
    sizeBytes,
    copy: (to) =>
      void tool('dd', [`if=${path}`, `of=${to}`, 'bs=1M', 'conv=sparse', 'status=none']),
    change() {
      for (const at of [0, 4096, 50 * MIB + 512, 96 * MIB])
        pokeWithDd(path, at, noise(at + 7, 8192));
      // The last bytes of the partition, which end within a chunk and within a block of 4 KiB.
      pokeWithDd(path, sizeBytes - 1024, noise(5, 1024));
      return Promise.resolve({ most: 7 * CHUNK });
    },
  };
}

async function randomDevice(dir: TempDir): Promise<Source> {
  const sizeBytes = 64 * MIB;
  const { device } = await newLoop(dir, 'random', sizeBytes, { sectorBytes: 4096 });
  pokeWithDd(device, 0, noise(31, sizeBytes));
  return {
    path: device,
    sizeBytes,
    copy: (to) => void tool('dd', [`if=${device}`, `of=${to}`, 'bs=1M', 'status=none']),
    change() {
      for (let i = 0; i < 40; i++)
        pokeWithDd(device, (i * 389 * 4096) % sizeBytes, noise(i + 100, 4096));
      return Promise.resolve({ most: 40 * CHUNK });
    },
  };
}

const SOURCES: readonly (readonly [string, (dir: TempDir) => Promise<Source>])[] = [
  ['a 4 GiB image with ext4 and files', ext4Image],
  ['a raw partition', rawPartition],
  ['a 64 MiB device of random data', randomDevice],
];

requires(NEEDS).describe('init, snapshot, change, snapshot, restore', () => {
  for (const [what, make] of SOURCES) {
    for (const how of [make === rawPartition ? BY_PASSWORD : ENCRYPTED, PLAIN]) {
      it(
        `${what}, ${how.name}`,
        async () => {
          const dir = newDir();
          const source = await make(dir);
          const b2 = await newRepository(dir, how);
          const references = [dir.join('reference-1'), dir.join('reference-2')] as const;

          const first = await b2.json<SnapshotAnswer>([
            'snapshot',
            source.path,
            '--name',
            'before',
            '--volume',
            'test/disk',
          ]);
          expect(first).toMatchObject({
            volume: 'test/disk',
            isNewVolume: true,
            id: '#1',
            name: 'before',
            class: 'crash',
            sizeBytes: source.sizeBytes,
          });
          source.copy(references[0]);
          const { most } = await source.change();
          const second = await b2.json<SnapshotAnswer>([
            'snapshot',
            source.path,
            '--name',
            'after',
          ]);
          source.copy(references[1]);
          expect(second).toMatchObject({
            volume: 'test/disk',
            isNewVolume: false,
            id: '#2',
            class: 'crash',
          });
          expect(second.changedBytes).toBeGreaterThan(0);
          expect(second.changedBytes).toBeLessThanOrEqual(most);
          expect(second.newBytes ?? Number.NaN).toBeLessThanOrEqual(second.changedBytes);
          expect(second.storedBytes).toBeLessThan((second.newBytes ?? Number.NaN) + MIB);
          // Nothing has changed since: nothing is stored, nothing is named.
          const third = await b2.json<SnapshotAnswer>(['snapshot', source.path]);
          expect(third).toMatchObject({ id: '#3', changedBytes: 0, newBytes: 0, storedBytes: 0 });

          const target = await newLoop(dir, 'target', source.sizeBytes);
          let isUsed = false;
          for (const [i, name] of ['before', 'after'].entries()) {
            const reference = references[i] ?? '';
            const file = dir.join(`${name}.img`);
            const toFile = await b2.json<RestoreAnswer>([
              'restore',
              'test/disk',
              file,
              '--at',
              name,
            ]);
            expect(toFile.restored).toMatchObject({
              verified: true,
              isWhole: true,
              sizeBytes: source.sizeBytes,
            });
            // Reading gigabytes of holes for each target takes minutes: once is enough for the large image.
            const compare = source.sizeBytes === 4 * GIB && !FULL ? cmpSparse : cmp;
            if (i === 1 && how !== PLAIN) cmp(reference, file);
            else compare(reference, file);
            source.check?.(file);
            // As sparse as the source, give or take the chunks at the edges of holes: more of them, the more files there are.
            const allocated = statSync(reference).blocks * 512;
            expect(statSync(file).blocks * 512).toBeLessThan(allocated * 1.01 + 16 * MIB);
            rmSync(file);

            // Without encryption the large image goes to the other targets once: the way is the same.
            if (how === PLAIN && source.sizeBytes === 4 * GIB && i === 0) continue;
            const force = isUsed ? ['--force'] : [];
            isUsed = true;
            await b2.json<RestoreAnswer>([
              'restore',
              'test/disk',
              target.device,
              '--at',
              `#${i + 1}`,
              ...force,
            ]);
            compare(reference, target.file);

            const qcow2 = dir.join(`${name}.qcow2`);
            const toVm = await b2.json<RestoreAnswer>([
              'restore',
              'test/disk',
              qcow2,
              '--format',
              'qcow2',
              '--at',
              name,
            ]);
            expect(toVm.restored).toMatchObject({ format: 'qcow2', verified: true });
            const back = dir.join('back.img');
            tool('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', qcow2, back]);
            compare(reference, back);
            rmSync(back);
            rmSync(qcow2);
          }
        },
        TEST_MS,
      );
    }
  }
});

requires(NEEDS).describe('what costs nothing', () => {
  it('holes of a file, zeros, and ranges discarded on a device', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, ENCRYPTED);
    const hole = sparseFile(dir, 'hole.img', 8 * GIB);
    pokeWithDd(hole, 5 * GIB, noise(1, MIB));
    const a = await b2.json<SnapshotAnswer>(['snapshot', hole, '--volume', 'hole']);
    expect(a.readBytes).toBeLessThanOrEqual(MIB + 2 * CHUNK);
    expect(a.newBytes).toBe(MIB);
    expect(a.storedBytes).toBeLessThan(MIB + 8 * KIB);

    const { device } = await newLoop(dir, 'ssd', 64 * MIB);
    pokeWithDd(device, 0, noise(2, 64 * MIB));
    const full = await b2.json<SnapshotAnswer>(['snapshot', device, '--volume', 'ssd']);
    expect(full.newBytes).toBe(64 * MIB);
    tool('blkdiscard', ['--offset', String(8 * MIB), '--length', String(40 * MIB), device]);
    const less = await b2.json<SnapshotAnswer>(['snapshot', device]);
    expect(less).toMatchObject({
      changedBytes: 40 * MIB,
      zeroBytes: 40 * MIB,
      newBytes: 0,
      storedBytes: 0,
    });
    await b2.json(['restore', 'ssd', dir.join('ssd.img')]);
    cmp(device, dir.join('ssd.img'));
    expect(statSync(dir.join('ssd.img')).blocks * 512).toBeLessThanOrEqual(24 * MIB + MIB);

    const zeros = dir.join('zeros.img');
    tool('dd', ['if=/dev/zero', `of=${zeros}`, 'bs=1M', 'count=32', 'status=none']);
    expect(await b2.json<SnapshotAnswer>(['snapshot', zeros, '--volume', 'zeros'])).toMatchObject({
      newBytes: 0,
      storedBytes: 0,
      changedBytes: 0,
    });
  });

  it('the same data of another volume and of another host', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, ENCRYPTED);
    const image = dir.join('a.img');
    tool('dd', ['if=/dev/urandom', `of=${image}`, 'bs=1M', 'count=40', 'status=none']);
    const first = await b2.json<SnapshotAnswer>(['snapshot', image, '--volume', 'web1/sda']);
    expect(first.newBytes).toBe(40 * MIB);
    const same = await b2.json<SnapshotAnswer>(['snapshot', image, '--volume', 'web2/sda']);
    expect(same).toMatchObject({
      isNewVolume: true,
      newBytes: 0,
      duplicateBytes: 40 * MIB,
      storedBytes: 0,
    });
    // Another host: another name of the machine, and no local copy of the index.
    tool('sh', ['-c', 'cat "$0" "$0" > "$1"', image, dir.join('b.img')]);
    const started = new B2(dir, { ...ENCRYPTED.env(dir), B2_CACHE_DIR: dir.join('other-cache') });
    const other = await started.json<SnapshotAnswer>([
      'snapshot',
      dir.join('b.img'),
      '--volume',
      'db/sdb',
    ]);
    expect(other).toMatchObject({ newBytes: 0, duplicateBytes: 80 * MIB, storedBytes: 0 });
    for (const [volume, reference] of [
      ['web1/sda', image],
      ['web2/sda', image],
      ['db/sdb', dir.join('b.img')],
    ] as const) {
      const out = dir.join(`${volume.replace('/', '-')}.img`);
      await b2.json(['restore', volume, out]);
      cmp(reference, out);
    }
  });
});

requires(NEEDS).describe('restore onto a used device', () => {
  it('rolls back by writing what differs, and says how much', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, ENCRYPTED);
    const { device, file } = await newLoop(dir, 'disk', 96 * MIB);
    pokeWithDd(device, 0, noise(3, 64 * MIB));
    await b2.json(['snapshot', device, '--volume', 'v', '--name', 'good']);
    copySparse(file, dir.join('reference'));
    const places = [0, 10 * MIB, 33 * MIB + 4096, 80 * MIB];
    for (const at of places) pokeWithDd(device, at, noise(at + 1, 4096));
    const plan = await b2.json<RestoreAnswer>(['restore', 'v', device, '--plan']);
    expect(plan.plan).toMatchObject({ compared: true, obstacles: [], sizeBytes: 96 * MIB });
    expect(plan.plan?.differingBytes).toBeLessThanOrEqual(places.length * CHUNK);
    const done = await b2.json<RestoreAnswer>(['restore', 'v', device, '--at', 'good', '--force']);
    const written = done.restored?.written;
    expect(written?.compared).toBe(true);
    expect((written?.writtenBytes ?? 0) + (written?.zeroedBytes ?? 0)).toBe(
      plan.plan?.differingBytes,
    );
    expect(written?.unchangedBytes).toBe(96 * MIB - (plan.plan?.differingBytes ?? 0));
    expect(written?.repositoryReadBytes).toBeLessThan(8 * places.length * CHUNK);
    cmp(device, dir.join('reference'));
    // Once more: nothing differs, nothing is written.
    const again = await b2.json<RestoreAnswer>(['restore', 'v', device, '--force']);
    expect(again.restored?.written).toMatchObject({
      writtenBytes: 0,
      zeroedBytes: 0,
      writtenExtents: 0,
    });
  });

  it('leaves nothing of the old data in ranges that are holes', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, PLAIN);
    const image = sparseFile(dir, 'mostly-holes.img', 64 * MIB);
    pokeWithDd(image, 30 * MIB, noise(4, 20 * KIB));
    await b2.json(['snapshot', image, '--volume', 'v']);
    for (const extra of [[], ['--full']]) {
      const { device, file, detach } = await newLoop(dir, `disk${extra.length}`, 64 * MIB);
      pokeWithDd(device, 0, noise(5, 64 * MIB));
      await b2.json(['restore', 'v', device, '--force', ...extra]);
      cmp(device, image);
      await detach();
      cmp(file, image);
    }
    const old = dir.join('old.img');
    tool('dd', ['if=/dev/urandom', `of=${old}`, 'bs=1M', 'count=70', 'status=none']);
    await b2.json(['restore', 'v', old, '--force']);
    cmp(old, image);
  });

  it('uses a larger disk with --grow: GPT, partition and file system', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, ENCRYPTED);
    const disk = await newLoop(dir, 'disk', 128 * MIB);
    tool('sfdisk', ['--quiet', disk.device], 'label: gpt\nsize=16MiB\nsize=100MiB\n');
    const [, second = ''] = addPartitions(dir, disk.device, 2);
    await makeFileSystem('ext4', second);
    const mount = await mountDevice(dir, second, 'mnt');
    fillWithFiles(dir, mount.path, 30 * MIB);
    await mount.unmount();
    await b2.json(['snapshot', disk.device, '--volume', 'v']);
    const larger = await newLoop(dir, 'larger', 256 * MIB);
    const done = await b2.json<RestoreAnswer>(['restore', 'v', larger.device, '--grow']);
    expect(done.restored?.grown?.notDone).toEqual([]);
    expect(tool('sgdisk', ['--verify', larger.device])).toMatch(/No problems found/);
    const [, grown = ''] = addPartitions(dir, larger.device, 2);
    expect(Number(tool('blockdev', ['--getsize64', grown]))).toBeGreaterThan(220 * MIB);
    expect(tool('e2fsck', ['-f', '-n', grown])).toMatch(/non-contiguous/);
    const blocks = /^Block count:\s+(\d+)$/m.exec(tool('dumpe2fs', ['-h', grown]))?.[1];
    const blockSize = /^Block size:\s+(\d+)$/m.exec(tool('dumpe2fs', ['-h', grown]))?.[1];
    expect(Number(blocks) * Number(blockSize)).toBeGreaterThan(220 * MIB);
    // Without --grow the rest of the disk is left alone, and the user is told.
    const other = await newLoop(dir, 'other', 256 * MIB);
    const plain = await b2.start(['restore', 'v', other.device]).ended;
    expect(plain.code).toBe(0);
    expect(plain.stderr).toMatch(
      /128\.0 MiB larger than the image.*backup of its partition table.*--grow/,
    );
  });
});

describe('points', () => {
  it('are chosen by name, number and time, and the choice is told', async () => {
    const dir = newDir();
    const b2 = await newRepository(dir, PLAIN);
    const image = sparseFile(dir, 'a.img', 5 * MIB + 300);
    for (const [i, name] of ['one', 'two', 'three'].entries()) {
      pokeWithDd(image, i * MIB, noise(i + 1, 5000));
      await b2.json(['snapshot', image, '--volume', 'v', '--name', name]);
      copySparse(image, dir.join(`ref-${name}`));
    }
    const { points } = await b2.json<PointsResult>(['points', 'v']);
    expect(points.map((p) => [p.id, p.snapshots])).toEqual([
      ['#1', ['one']],
      ['#2', ['two']],
      ['#3', ['three']],
    ]);
    const second = points[1]?.time ?? '';
    for (const [i, at] of ['two', '#2', second].entries()) {
      const out = dir.join(`out-${i}`);
      const done = await b2.json<RestoreAnswer>(['restore', 'v', out, '--at', at]);
      expect(done.point).toMatchObject({ id: '#2', time: second });
      cmp(out, dir.join('ref-two'));
    }
    const missing = await b2.error([
      'restore',
      'v',
      dir.join('none'),
      '--at',
      '2001-01-01T00:00:00Z',
    ]);
    expect(missing.code).toBe(4);
    expect((await b2.error(['restore', 'v', dir.join('none'), '--at', 'four'])).code).not.toBe(0);
    expect((await b2.error(['restore', 'w', dir.join('none')])).code).toBe(4);
    expect((await b2.error(['snapshot', image, '--volume', 'v', '--name', 'two'])).message).toBe(
      'volume v has a snapshot named "two" already',
    );
  });
});
