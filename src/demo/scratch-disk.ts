/**
 * The disk of `b2 demo`: a loop device with ext4 where that can be had, else an image file with ext4 (made and read
 * by e2fsprogs, without mounting), else an image file without a file system.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Random } from '../clock.js';
import { lastWords, runTool } from '../devices/run.js';
import { B2Error, messageOf } from '../errors.js';

const MIB = 1024 * 1024;
/** Of the disk. Small, so that the demo takes seconds; large enough that a rollback writes a small part of it. */
export const DISK_BYTES = 96 * MIB;
const PHOTOS = 24;
const PHOTO_BYTES = MIB;
const TOOL_TIMEOUT_MS = 60_000;

/** A disk with files on it, and what the story does to it: lines of shell, run in the demo's directory. */
export interface ScratchDisk {
  readonly kind: 'device' | 'image';
  /** What `b2 snapshot` gets in the demo's directory. */
  readonly path: string;
  /** A clause: "a loop device with ext4 and 25 files". */
  readonly what: string;
  readonly work: string;
  readonly accident: string;
  /** Shows that the files are (or are not) there. */
  readonly look: string;
  /** Work for a second or so, and what ends it. */
  readonly busy: string;
  readonly rest: string | undefined;
  /** SHA-256 of every byte of the disk, while nothing uses it. */
  digest(): Promise<string>;
  /** Unmounts and detaches; the image file stays. Safe to call twice. */
  close(): Promise<void>;
}

async function tool(name: string, args: readonly string[]): Promise<string> {
  const done = await runTool(name, args, TOOL_TIMEOUT_MS);
  if (done === undefined) throw new B2Error('unsupported', `there is no program ${name}`);
  if (done.status !== 0) throw new B2Error('failed', `${name}: ${lastWords(done)}`);
  return done.stdout;
}

/** SHA-256 of a file. */
export async function digestOf(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const part of createReadStream(path, { highWaterMark: MIB })) {
    hash.update(part as Buffer);
  }
  return hash.digest('hex');
}

async function emptyImage(path: string): Promise<void> {
  await using file = await open(path, 'wx', 0o600);
  await file.truncate(DISK_BYTES);
}

const LEDGER = Array.from({ length: 2000 }, (_, i) => `bill ${i + 1}; open\n`).join('');

/** The files of the demo: 24 photos that do not compress, a ledger that does. */
async function writeFiles(dir: string, random: Random): Promise<void> {
  await mkdir(join(dir, 'photos'), { recursive: true });
  for (let i = 1; i <= PHOTOS; i++) {
    const name = `${String(i).padStart(2, '0')}.jpg`;
    await writeFile(join(dir, 'photos', name), random(PHOTO_BYTES));
  }
  await writeFile(join(dir, 'ledger.txt'), LEDGER);
}

/** Needs root, loop devices and e2fsprogs; rejects, leaving nothing, where one is missing. */
async function deviceDisk(dir: string, random: Random): Promise<ScratchDisk> {
  const image = join(dir, 'disk.img');
  const mnt = join(dir, 'mnt');
  await emptyImage(image);
  let device: string | undefined;
  const close = async (): Promise<void> => {
    if (device === undefined) return;
    // Not mounted is the normal case here, and no failure.
    await runTool('umount', [mnt], TOOL_TIMEOUT_MS);
    await tool('losetup', ['--detach', device]);
    device = undefined;
  };
  try {
    await mkdir(mnt, { mode: 0o700 });
    device = (await tool('losetup', ['--find', '--show', image])).trim();
    await tool('mkfs.ext4', ['-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0', device]);
    await tool('mount', [device, mnt]);
    await writeFiles(mnt, random);
    await tool('umount', [mnt]);
  } catch (error) {
    await close();
    await rm(image, { force: true });
    await rm(mnt, { recursive: true, force: true });
    throw error;
  }
  const mounted = (script: string, options = ''): string =>
    `mount ${options}${device} mnt && { ${script}; umount mnt; }`;
  return {
    kind: 'device',
    path: device,
    what: `a loop device of 96 MiB with ext4 and ${PHOTOS + 1} files`,
    work: mounted('echo "Tuesday: all bills are paid" >> mnt/ledger.txt'),
    accident: mounted(
      'rm -rf mnt/photos mnt/ledger.txt; sync; head -c 8M /dev/urandom > mnt/movie',
    ),
    look: mounted('ls mnt; ls mnt/photos | wc -l; tail -n 1 mnt/ledger.txt', '-o ro '),
    busy: `mount ${device} mnt && for i in 1 2 3; do echo "Thursday: bill $i is sent" >> mnt/ledger.txt; sync -f mnt; sleep 0.3; done`,
    rest: 'umount mnt',
    digest: () => digestOf(image),
    close,
  };
}

/** ext4 in an image file, without root: made from a directory, and changed by debugfs. */
async function imageDisk(dir: string, random: Random): Promise<ScratchDisk> {
  const image = join(dir, 'disk.img');
  const files = join(dir, 'files');
  try {
    await emptyImage(image);
    await writeFiles(files, random);
    await tool('mkfs.ext4', ['-q', '-F', '-d', files, image]);
    await tool('debugfs', ['-R', 'stat ledger.txt', image]);
    await writeFile(join(dir, 'tuesday.txt'), 'Tuesday: all bills are paid\n');
  } catch (error) {
    await rm(image, { force: true });
    throw error;
  } finally {
    await rm(files, { recursive: true, force: true });
  }
  const debugfs = (request: string, more = ''): string =>
    `debugfs ${more}-R "${request}" disk.img 2>&1`;
  return {
    kind: 'image',
    path: 'disk.img',
    what: `an image file of 96 MiB with ext4 and ${PHOTOS + 1} files`,
    work: debugfs('write tuesday.txt tuesday.txt', '-w '),
    accident: [debugfs('rm ledger.txt', '-w '), debugfs('rm tuesday.txt', '-w ')].join('; '),
    look: [debugfs('ls -p /'), debugfs('cat tuesday.txt')].join('; '),
    busy: debugfs('write tuesday.txt thursday.txt', '-w '),
    rest: undefined,
    digest: () => digestOf(image),
    close: () => Promise.resolve(),
  };
}

/** What any machine has: an image file with a text at its beginning and data behind it. */
async function plainDisk(dir: string, random: Random): Promise<ScratchDisk> {
  const image = join(dir, 'disk.img');
  await emptyImage(image);
  await using file = await open(image, 'r+');
  for (let i = 1; i <= PHOTOS; i++)
    await file.write(random(PHOTO_BYTES), 0, PHOTO_BYTES, i * 2 * MIB);
  await file.write(Buffer.from('The ledger of Monday'), 0, undefined, 0);
  return {
    kind: 'image',
    path: 'disk.img',
    what: 'an image file of 96 MiB',
    work: 'printf "Tuesday: all bills are paid" | dd of=disk.img conv=notrunc status=none',
    accident: 'dd if=/dev/zero of=disk.img bs=1M count=3 conv=notrunc status=none',
    look: 'head -c 27 disk.img',
    busy: 'printf "Thursday: a bill is sent" | dd of=disk.img conv=notrunc status=none',
    rest: undefined,
    digest: () => digestOf(image),
    close: () => Promise.resolve(),
  };
}

/** `loop` needs root; the last one works everywhere. */
export type DiskKind = 'loop' | 'ext4' | 'plain';

const MAKERS = { loop: deviceDisk, ext4: imageDisk, plain: plainDisk } as const;
const WHAT = { loop: 'loop device with ext4', ext4: 'image with ext4', plain: 'image' } as const;

/** The first of `kinds` that can be had here, made in `dir`; `note` hears why it is not an earlier one. */
export async function makeScratchDisk(
  dir: string,
  options: {
    readonly kinds: readonly DiskKind[];
    readonly random: Random;
    readonly note: (text: string) => void;
  },
): Promise<ScratchDisk> {
  for (const kind of options.kinds) {
    try {
      return await MAKERS[kind](dir, options.random);
    } catch (error) {
      if (!(error instanceof B2Error) || kind === options.kinds.at(-1)) throw error;
      options.note(`There can be no ${WHAT[kind]} here (${messageOf(error)}).`);
    }
  }
  throw new RangeError('no kind of disk');
}
