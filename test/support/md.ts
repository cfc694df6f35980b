/** Members of arrays that Debian's mdadm and kernel have made (test/fixtures/md). */
import {
  closeSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  readSync,
  writeSync,
} from 'node:fs';
import { fileURLToPath } from 'node:url';

import { tool } from './disks.js';
import { sparseFile } from './loop.js';
import type { TempDir } from './tmp.js';

const FIXTURE = fileURLToPath(new URL('../fixtures/md/', import.meta.url));
const MIB = 1024 * 1024;

/** What is needed to make a disk of them. */
export const MD_TOOLS = ['tar', 'gzip', 'sfdisk'];

/** Unpacks them; their names. */
export function unpackMembers(directory: string): readonly string[] {
  tool('tar', ['-C', directory, '-xSzf', `${FIXTURE}members.tar.gz`]);
  return readdirSync(directory).sort();
}

/** SHA-256 and `LABEL/PATH` of every file in the arrays, as the machine that made them said. */
export function memberSums(): readonly (readonly [sum: string, label: string, path: string])[] {
  return readFileSync(`${FIXTURE}sums`, 'utf8')
    .trim()
    .split('\n')
    .map((line) => {
      const [sum = '', place = ''] = line.split('  ');
      const slash = place.indexOf('/');
      return [sum, place.slice(0, slash), place.slice(slash)] as const;
    });
}

/** What mdadm says of each: name, and its lines as a map. */
export function memberFacts(): ReadonlyMap<string, ReadonlyMap<string, string>> {
  const facts = new Map<string, ReadonlyMap<string, string>>();
  for (const section of readFileSync(`${FIXTURE}facts`, 'utf8').split('== ').slice(1)) {
    const [name = '', ...lines] = section.split('\n');
    const pairs = lines.flatMap((line) => {
      const [key = '', value] = line.split(' : ');
      return value === undefined ? [] : [[key.trim(), value.trim()] as const];
    });
    facts.set(name, new Map(pairs));
  }
  return facts;
}

/** A disk with a GPT whose partitions are these members, in their order. */
export function diskOfMembers(dir: TempDir, members: string, names: readonly string[]): string {
  const sizes = names.map((name) => statSync(`${members}/${name}`).size);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const disk = sparseFile(dir, `disk-of-${names.length}`, total + 2 * MIB);
  const table = sizes.map((size) => `size=${size / MIB}M\n`).join('');
  tool('sfdisk', ['-q', disk], `label: gpt\n${table}`);
  const to = openSync(disk, 'r+');
  let at = MIB;
  const piece = Buffer.alloc(64 * 1024);
  const zeros = Buffer.alloc(piece.length);
  for (const [i, name] of names.entries()) {
    const from = openSync(`${members}/${name}`, 'r');
    for (let offset = 0; offset < (sizes[i] ?? 0); offset += piece.length) {
      const bytes = readSync(from, piece, 0, piece.length, offset);
      const isZero = piece.subarray(0, bytes).equals(zeros.subarray(0, bytes));
      if (!isZero) writeSync(to, piece, 0, bytes, at + offset);
    }
    closeSync(from);
    at += sizes[i] ?? 0;
  }
  closeSync(to);
  return disk;
}
