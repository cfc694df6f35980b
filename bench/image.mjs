/**
 * The image that the benchmark captures: ext4 with real files. Of its size 55 % are files of this machine's
 * /usr, 10 % random data, 5 % files of zeros; the rest was never written (holes).
 */
import { spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import {
  closeSync,
  copyFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { onExit } from './measure.mjs';

const MIB = 2 ** 20;
/** Larger files of /usr are left out: one of them would be a large part of a small image. */
const MAX_FILE_BYTES = 63 * MIB;
/** Blocks changed for the rollback come in runs of this size, at places that are not aligned to it. */
const CHANGE_BYTES = 16 * 4096;

/** A generator of the same numbers in [0, 1) for the same seed (mulberry32). */
export function seededRandom(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Regular files below `dir`, in order of their paths, without following links. */
function* filesBelow(dir) {
  const entries = readdirSync(dir, { withFileTypes: true });
  for (const entry of entries.toSorted((a, b) => (a.name < b.name ? -1 : 1))) {
    const file = path.join(dir, entry.name);
    if (entry.isDirectory()) yield* filesBelow(file);
    else if (entry.isFile()) yield file;
  }
}

/** Copies three of five files of /usr until they take `budgetBytes` on disk; returns what they take. */
function copyUsr(target, budgetBytes) {
  const random = seededRandom(7);
  let usedBytes = 0;
  for (const file of filesBelow('/usr')) {
    const { size, blocks } = lstatSync(file);
    if (size > MAX_FILE_BYTES || random() >= 0.6) continue;
    usedBytes += blocks * 512;
    if (usedBytes > budgetBytes) return budgetBytes;
    const copy = path.join(target, file);
    mkdirSync(path.dirname(copy), { recursive: true });
    copyFileSync(file, copy);
  }
  return usedBytes;
}

function writeFiles(dir, count, bytesEach, fill) {
  mkdirSync(dir);
  const buffer = Buffer.alloc(MIB);
  for (let i = 1; i <= count; i += 1) {
    const fd = openSync(path.join(dir, String(i)), 'wx');
    for (let done = 0; done < bytesEach; done += buffer.length) {
      fill(buffer);
      writeSync(fd, buffer, 0, Math.min(buffer.length, bytesEach - done));
    }
    closeSync(fd);
  }
}

function fillTree(tree, sizeMiB, say) {
  const budgetBytes = sizeMiB * 0.55 * MIB;
  const usedBytes = copyUsr(tree, budgetBytes);
  if (usedBytes < budgetBytes * 0.9) {
    const [used, budget] = [usedBytes, budgetBytes].map((bytes) => Math.round(bytes / MIB));
    say(`image: /usr has only ${used} of ${budget} MiB to copy`);
  }
  const hundredth = Math.floor((sizeMiB * MIB) / 100);
  writeFiles(path.join(tree, 'random'), 10, hundredth, (buffer) => randomFillSync(buffer));
  writeFiles(path.join(tree, 'zero'), 5, hundredth, (buffer) => buffer.fill(0));
}

/** `img4g.img` for 4096, `img256m.img` for 256. */
export function imageName(sizeMiB) {
  return sizeMiB % 1024 === 0 ? `img${sizeMiB / 1024}g.img` : `img${sizeMiB}m.img`;
}

/** The image of this size in `dir`, made if it is not there; it appears whole or not at all. */
export function prepareImage(dir, sizeMiB, say) {
  const image = path.join(dir, imageName(sizeMiB));
  if (existsSync(image)) {
    if (statSync(image).size !== sizeMiB * MIB)
      throw new Error(`${image} has not ${sizeMiB} MiB; delete it to have it made again`);
    say(`image: ${image} (made before)`);
    return image;
  }
  say(`image: making ${image} (once; it is kept)`);
  const tree = mkdtempSync(path.join(dir, 'tree-'));
  const fresh = `${tree}.img`;
  const release = onExit(() => {
    rmSync(tree, { recursive: true, force: true });
    rmSync(fresh, { force: true });
  });
  try {
    fillTree(tree, sizeMiB, say);
    closeSync(openSync(fresh, 'wx'));
    truncateSync(fresh, sizeMiB * MIB);
    const options = ['-q', '-F', '-E', 'lazy_itable_init=0', '-d', tree];
    const made = spawnSync('mkfs.ext4', [...options, fresh], { encoding: 'utf8' });
    if (made.status !== 0)
      throw new Error(`mkfs.ext4 ${fresh}: ${made.error?.message ?? made.stderr}`);
    renameSync(fresh, image);
  } finally {
    release();
  }
  return image;
}

/**
 * Inverts 1 % of the blocks of `file`, in runs of 64 KiB at places that depend on `seed` alone. A block
 * that is hit twice stays inverted, so that exactly these blocks differ from the image.
 */
export function changeOnePercent(file, seed) {
  const random = seededRandom(seed);
  const sizeBytes = statSync(file).size;
  const blocks = Math.floor(sizeBytes / 4096);
  const runs = Math.max(1, Math.round(sizeBytes / 100 / CHANGE_BYTES));
  const changed = new Set();
  const fd = openSync(file, 'r+');
  const buffer = Buffer.alloc(4096);
  for (let i = 0; i < runs; i += 1) {
    const first = Math.floor(random() * (blocks - CHANGE_BYTES / 4096));
    for (let block = first; block < first + CHANGE_BYTES / 4096; block += 1) {
      if (changed.has(block)) continue;
      changed.add(block);
      readSync(fd, buffer, 0, 4096, block * 4096);
      for (let at = 0; at < 4096; at += 1) buffer[at] ^= 0xff;
      writeSync(fd, buffer, 0, 4096, block * 4096);
    }
  }
  closeSync(fd);
  return changed.size;
}
