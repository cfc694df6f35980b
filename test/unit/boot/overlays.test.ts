/** What a machine writes to several disks is one state: it is gone on with whole, or not at all. */
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { keepWrites, LIST, type KeptDisk } from '../../../src/boot/overlays.js';
import { openOverlay, type WritableImage } from '../../../src/nbd/index.js';
import { MemoryImage } from '../../support/image-memory.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const SIZE = 64 * 1024;

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
});
afterEach(() => dir.remove());

function disk(name: string, seq = 1): KeptDisk {
  const volume = Buffer.from(name.padEnd(16).slice(0, 16)).toString('hex');
  return {
    name,
    sizeBytes: SIZE,
    identity: { repository: 'ee'.repeat(16), volume, seq, hash: 'aa'.repeat(32) },
  };
}

async function openAll(path: string, disks: readonly KeptDisk[]): Promise<WritableImage[]> {
  const images: WritableImage[] = [];
  try {
    for (const open of await keepWrites(path, disks))
      images.push(await open(new MemoryImage([{ length: SIZE, hole: true }])));
    return images;
  } catch (error) {
    for (const image of images) await image.close();
    throw error;
  }
}

/** Writes `fill` to the first block of each disk, and another number each. */
async function write(path: string, disks: readonly KeptDisk[], fill: number): Promise<void> {
  for (const [i, image] of (await openAll(path, disks)).entries()) {
    await image.write(Buffer.alloc(4096, fill + i), 0);
    await image.close();
  }
}

async function firstBytes(path: string, disks: readonly KeptDisk[]): Promise<number[]> {
  const bytes: number[] = [];
  for (const image of await openAll(path, disks)) {
    const into = Buffer.alloc(1);
    await image.read(into, 0);
    bytes.push(into[0] ?? -1);
    await image.close();
  }
  return bytes;
}

describe('what a machine writes', () => {
  it('to one disk is in one file, which any server of that point may go on with', async () => {
    const path = dir.join('one');
    await write(path, [disk('a')], 7);
    expect(await firstBytes(path, [disk('a')])).toEqual([7]);
    const base = new MemoryImage([{ length: SIZE, hole: true }]);
    await (await openOverlay({ path, base, identity: disk('a').identity })).close();
    expect(readdirSync(dir.path)).toEqual(['one']);
  });

  it('to several is in a directory that is there with all of them or not at all, and nothing else', async () => {
    const path = dir.join('both');
    const disks = [disk('web/sda'), disk('web/sdb', 9)];
    await write(path, disks, 20);
    expect(readdirSync(dir.path)).toEqual(['both']);
    expect(readdirSync(path).sort()).toEqual(['disk0', 'disk1', LIST]);
    expect(await firstBytes(path, disks)).toEqual([20, 21]);
    // In another order they are still whose they are.
    expect(await firstBytes(path, disks.toReversed())).toEqual([21, 20]);
    expect(JSON.parse(readFileSync(`${path}/${LIST}`, 'utf8'))).toMatchObject({
      version: 1,
      disks: [
        { file: 'disk0', name: 'web/sda', seq: 1 },
        { file: 'disk1', name: 'web/sdb', seq: 9 },
      ],
    });
  });

  it('to other disks or points is refused: fewer, more, another point of one of them', async () => {
    const path = dir.join('both');
    await write(path, [disk('a'), disk('b')], 1);
    for (const disks of [
      [disk('a')],
      [disk('a'), disk('b'), disk('c')],
      [disk('a'), disk('c')],
      [disk('a'), disk('b', 2)],
      [disk('a', 2), disk('b', 2)],
    ])
      await expect(keepWrites(path, disks)).rejects.toMatchObject({
        kind: 'refused',
        message: expect.stringContaining(
          'keeps what a machine wrote to a #1, b #1; this one would have a #',
        ) as string,
      });
    await expect(keepWrites(path, [disk('a', 2), disk('b', 2)])).rejects.toMatchObject({
      hint: expect.stringContaining('--at "#1"') as string,
    });
    // And of one disk alone, where there are two.
    await write(dir.join('one'), [disk('a')], 1);
    await expect(keepWrites(dir.join('one'), [disk('a'), disk('b')])).rejects.toMatchObject({
      kind: 'refused',
      hint: expect.stringContaining('--alone') as string,
    });
    expect(await firstBytes(path, [disk('a'), disk('b')])).toEqual([1, 2]);
  });

  it('of one machine does not go with that of another on the same points', async () => {
    const disks = [disk('a'), disk('b')];
    await write(dir.join('x'), disks, 1);
    await write(dir.join('y'), disks, 5);
    copyFileSync(dir.join('y', 'disk1'), dir.join('x', 'disk1'));
    await expect(openAll(dir.join('x'), disks)).rejects.toMatchObject({
      kind: 'refused',
      message: expect.stringContaining('does not belong to those of the other disks') as string,
    });
    // Nor with one that was made for a disk by itself.
    await write(dir.join('one'), [disk('b')], 1);
    copyFileSync(dir.join('one'), dir.join('x', 'disk1'));
    await expect(openAll(dir.join('x'), disks)).rejects.toMatchObject({ kind: 'refused' });
  });

  it('to one of several is not gone on with by itself', async () => {
    await write(dir.join('x'), [disk('a'), disk('b')], 1);
    const base = new MemoryImage([{ length: SIZE, hole: true }]);
    await expect(
      openOverlay({ path: dir.join('x', 'disk0'), base, identity: disk('a').identity }),
    ).rejects.toMatchObject({
      kind: 'refused',
      message: expect.stringContaining('is one of several disks of a machine') as string,
    });
    expect(base.closed).toBe(1);
  });

  it('of which a part is gone is damaged, and nothing fresh takes its place', async () => {
    const disks = [disk('a'), disk('b')];
    const path = dir.join('x');
    await write(path, disks, 1);
    const openers = await keepWrites(path, disks);
    rmSync(dir.join('x', 'disk1'));
    await expect(keepWrites(path, disks)).rejects.toMatchObject({
      kind: 'damaged',
      message: expect.stringContaining('which keeps the writes to b, is not there') as string,
    });
    // Also if it goes after the look.
    const base = new MemoryImage([{ length: SIZE, hole: true }]);
    await expect(openers[1]?.(base)).rejects.toMatchObject({ kind: 'not-found' });
    expect(base.closed).toBe(1);
    expect(readdirSync(path).sort()).toEqual(['disk0', LIST]);
  });

  it('is not looked for in what is something else', async () => {
    const disks = [disk('a'), disk('b')];
    mkdirSync(dir.join('home'));
    writeFileSync(dir.join('home', 'letter'), 'dear');
    await expect(keepWrites(dir.join('home'), disks)).rejects.toMatchObject({ kind: 'refused' });
    await expect(keepWrites(dir.join('home'), [disk('a')])).rejects.toMatchObject({
      kind: 'refused',
    });
    for (const text of [
      '',
      '{}',
      '{"version":1,"set":"x","disks":[{"file":"../../etc/passwd"}]}',
    ]) {
      writeFileSync(dir.join('home', LIST), text);
      await expect(keepWrites(dir.join('home'), disks)).rejects.toMatchObject({ kind: 'damaged' });
    }
    expect(readdirSync(dir.join('home')).sort()).toEqual([LIST, 'letter']);
    await expect(keepWrites(dir.join('no/where'), disks)).rejects.toMatchObject({
      kind: 'not-found',
    });
  });

  it('is used by one machine at a time', async () => {
    const disks = [disk('a'), disk('b')];
    const images = await openAll(dir.join('x'), disks);
    await expect(openAll(dir.join('x'), disks)).rejects.toMatchObject({ kind: 'held' });
    for (const image of images) await image.close();
    expect(await firstBytes(dir.join('x'), disks)).toEqual([0, 0]);
  });
});
