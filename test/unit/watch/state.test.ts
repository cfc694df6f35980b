/** The record of a clean stop: what it survives, and what it is not believed after. */
import {
  mkdirSync,
  readFileSync,
  readdirSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { DeviceFacts } from '../../../src/devices/device.js';
import { devNumberOf } from '../../../src/devices/sysfs.js';
import {
  cleanStopFile,
  defaultStateDir,
  fullStamp,
  readCleanStop,
  removeCleanStop,
  whyNotInSync,
  writeCleanStop,
  type CleanStop,
} from '../../../src/watch/state.js';
import { memoryDevice } from '../../support/device-memory.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const REPO = 'a'.repeat(32);
const VOLUME = 'b'.repeat(32);
const record: CleanStop = {
  repositoryId: REPO,
  volumeId: VOLUME,
  seq: 12,
  hash: 'c'.repeat(64),
  sizeBytes: 1 << 20,
  identity: { serial: 'S' },
  counters: 'disk boot-1 41 1048576 800 0',
};
const facts = (more: Partial<DeviceFacts> = {}): DeviceFacts => ({
  ...memoryDevice(Buffer.alloc(1 << 20)).facts,
  identity: { serial: 'S' },
  ...more,
});

describe('the file', () => {
  it('is for its owner alone, and gives back what was written', async () => {
    await using dir = tempDir();
    const at = dir.join('deep', 'state');
    expect(await readCleanStop(at, REPO, VOLUME)).toBeUndefined();
    await writeCleanStop(at, record);
    const file = cleanStopFile(at, REPO, VOLUME);
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(statSync(at).mode & 0o777).toBe(0o700);
    expect(readdirSync(at)).toHaveLength(1);
    expect(await readCleanStop(at, REPO, VOLUME)).toEqual(record);
    expect(await readCleanStop(at, REPO, 'd'.repeat(32))).toBeUndefined();
    await removeCleanStop(at, REPO, VOLUME);
    expect(await readCleanStop(at, REPO, VOLUME)).toBeUndefined();
    await removeCleanStop(at, REPO, VOLUME);
    await removeCleanStop(dir.join('nowhere'), REPO, VOLUME);
  });

  it('is not believed with any byte changed or missing', async () => {
    await using dir = tempDir();
    await writeCleanStop(dir.path, record);
    const file = cleanStopFile(dir.path, REPO, VOLUME);
    const text = readFileSync(file, 'utf8').trimEnd();
    for (let i = 0; i < text.length; i += 3) {
      const changed = `${text.slice(0, i)}${text[i] === '1' ? '2' : '1'}${text.slice(i + 1)}`;
      writeFileSync(file, changed);
      expect(await readCleanStop(dir.path, REPO, VOLUME), changed).toBeUndefined();
      writeFileSync(file, text.slice(0, i));
      expect(await readCleanStop(dir.path, REPO, VOLUME)).toBeUndefined();
    }
    // Another volume's record under this one's name.
    await writeCleanStop(dir.path, { ...record, volumeId: 'd'.repeat(32) });
    writeFileSync(file, readFileSync(cleanStopFile(dir.path, REPO, 'd'.repeat(32))));
    expect(await readCleanStop(dir.path, REPO, VOLUME)).toBeUndefined();
  });

  it('that cannot be removed stops everything', async () => {
    await using dir = tempDir();
    mkdirSync(cleanStopFile(dir.path, REPO, VOLUME));
    await expect(removeCleanStop(dir.path, REPO, VOLUME)).rejects.toMatchObject({
      kind: 'io',
      hint: expect.stringContaining('Remove it by hand') as string,
    });
  });

  it('lies where state belongs', () => {
    expect(defaultStateDir({}, 0)).toBe('/var/lib/b2/watch');
    expect(defaultStateDir({ HOME: '/home/u' }, 1000)).toBe('/home/u/.local/state/b2/watch');
    expect(defaultStateDir({ HOME: '/home/u', XDG_STATE_HOME: '/s' }, 1000)).toBe('/s/b2/watch');
  });
});

describe('a record', () => {
  const tip = { seq: 12, hash: 'c'.repeat(64) };
  const now = { counters: record.counters, writesInFlight: 0 };
  it('is believed where everything is as it was', () => {
    expect(whyNotInSync(record, tip, facts(), now)).toBeUndefined();
  });
  it.each([
    ['another commit', { ...tip, seq: 13 }, facts(), now, 'has changed in the repository'],
    ['another hash', { ...tip, hash: 'd' }, facts(), now, 'has changed in the repository'],
    ['no commit', { seq: 0, hash: undefined }, facts(), now, 'has changed in the repository'],
    ['another size', tip, facts({ sizeBytes: 512 }), now, 'another size'],
    ['another serial', tip, facts({ identity: { serial: 'T' } }), now, 'identity (serial)'],
    ['less identity', tip, facts({ identity: {} }), now, 'identity (serial)'],
    ['more identity', tip, facts({ identity: { serial: 'S', wwn: 'w' } }), now, 'identity (wwn)'],
    ['no counters', tip, facts(), { counters: undefined, writesInFlight: 0 }, 'does not count'],
    ['a write under way', tip, facts(), { ...now, writesInFlight: 1 }, 'being written'],
    [
      'another boot',
      tip,
      facts(),
      { ...now, counters: 'disk boot-2 41 1048576 800 0' },
      'the machine was started anew',
    ],
    [
      'a write',
      tip,
      facts(),
      { ...now, counters: 'disk boot-1 41 1048576 808 0' },
      'it was written',
    ],
  ] as const)('is not believed after %s', (_name, t, f, stamp, why) => {
    expect(whyNotInSync(record, t, f, stamp)).toContain(why);
  });
});

interface Fake {
  readonly roots: { readonly sys: string; readonly proc: string; readonly dev: string };
  put(file: string, text: string): void;
}

/** A machine with two disks, `low0` and `low1`, for `top0` to lie on. /dev/null stands for top0's node. */
function fakeMachine(dir: TempDir): Fake {
  const roots = { sys: dir.join('sys'), proc: dir.join('proc'), dev: dir.join('dev') };
  const put = (file: string, text: string): void => writeFileSync(dir.join(file), `${text}\n`);
  mkdirSync(dir.join('proc/sys/kernel/random'), { recursive: true });
  put('proc/sys/kernel/random/boot_id', 'boot-1');
  mkdirSync(dir.join('sys/class/block'), { recursive: true });
  for (const [name, seq] of [
    ['top0', '1'],
    ['low0', '2'],
    ['low1', '3'],
  ] as const) {
    for (const sub of ['queue', 'slaves', 'loop'])
      mkdirSync(dir.join('sys/devices', name, sub), { recursive: true });
    symlinkSync(`../../devices/${name}`, dir.join('sys/class/block', name));
    put(`sys/devices/${name}/stat`, '1 0 8 0 5 0 40 0 0 0 0 0 0 0 0');
    put(`sys/devices/${name}/inflight`, '0 0');
    put(`sys/devices/${name}/diskseq`, seq);
    put(`sys/devices/${name}/queue/iostats`, '1');
  }
  return { roots, put };
}

const STAT = (sectors: number): string => `1 0 8 0 5 0 ${sectors} 0 0 0 0 0 0 0 0`;

describe('the stamp of a device and of what it lies on', () => {
  const top = { devNumber: '7:7', diskSequence: 1n, realPath: 'top0' };

  it('is that of the device alone where there is nothing below', async () => {
    await using dir = tempDir();
    const { roots, put } = fakeMachine(dir);
    const f = facts(node(roots.sys, top));
    const before = await fullStamp(f, roots);
    expect(before).toMatchObject({ writesInFlight: 0 });
    expect(before.counters).toBeDefined();
    put('sys/devices/low0/stat', STAT(99));
    expect(await fullStamp(f, roots)).toEqual(before);
    put('sys/devices/top0/stat', STAT(48));
    expect((await fullStamp(f, roots)).counters).not.toBe(before.counters);
  });

  it('changes with a write to any disk below, and where that does not count there is none', async () => {
    await using dir = tempDir();
    const { roots, put } = fakeMachine(dir);
    const f = facts(node(roots.sys, top));
    symlinkSync('../../low0', dir.join('sys/devices/top0/slaves/low0'));
    symlinkSync('../../low1', dir.join('sys/devices/low0/slaves/low1'));
    const before = await fullStamp(f, roots);
    expect(before.counters).toBeDefined();
    put('sys/devices/low1/stat', STAT(48));
    expect((await fullStamp(f, roots)).counters).not.toBe(before.counters);
    put('sys/devices/low1/stat', STAT(40));
    expect(await fullStamp(f, roots)).toEqual(before);
    put('sys/devices/low1/inflight', '0 2');
    expect((await fullStamp(f, roots)).writesInFlight).toBe(2);
    put('sys/devices/low1/queue/iostats', '0');
    expect((await fullStamp(f, roots)).counters).toBeUndefined();
  });

  it('changes with the file behind a loop device', async () => {
    await using dir = tempDir();
    const { roots, put } = fakeMachine(dir);
    const f = facts(node(roots.sys, top));
    const file = dir.join('disk.img');
    writeFileSync(file, 'x');
    put('sys/devices/top0/loop/backing_file', file);
    const before = await fullStamp(f, roots);
    expect(before.counters).toContain('file ');
    utimesSync(file, 1, 1);
    expect((await fullStamp(f, roots)).counters).not.toBe(before.counters);
    put('sys/devices/top0/loop/backing_file', `${file} (deleted)`);
    expect((await fullStamp(f, roots)).counters).toBeUndefined();
  });

  it('does not exist where one attachment looks like another', async () => {
    await using dir = tempDir();
    const { roots } = fakeMachine(dir);
    const f = facts(node(roots.sys, top));
    expect((await fullStamp({ ...f, diskSequence: undefined }, roots)).counters).toBeUndefined();
  });
});

/** Lets a block device of this machine be `top0`: only real nodes have numbers. Nothing of it is read or written. */
function node(sys: string, top: Partial<DeviceFacts>): Partial<DeviceFacts> {
  mkdirSync(`${sys}/dev/block`, { recursive: true });
  const found = readdirSync('/dev').find((name) =>
    statSync(`/dev/${name}`, { throwIfNoEntry: false })?.isBlockDevice(),
  );
  if (found === undefined) throw new Error('this machine has no block device');
  const number = devNumberOf(statSync(`/dev/${found}`, { bigint: true }).rdev);
  symlinkSync('../../devices/top0', `${sys}/dev/block/${number}`);
  return { ...top, devNumber: number, realPath: `/dev/${found}` };
}
