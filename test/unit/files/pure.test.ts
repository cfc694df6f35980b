/** The parts of src/files that are pure: names, places, what find, tar, filefrag and the tiny VM say, cpio. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, statSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import fc from 'fast-check';

import { parseExtents } from '../../../src/files/access.js';
import { cpioArchive } from '../../../src/files/cpio.js';
import { tellNotes } from '../../../src/files/environment.js';
import { FindParser } from '../../../src/files/find-output.js';
import { FrameParser, type Frame } from '../../../src/files/frames.js';
import { ModuleTree, parseLdd } from '../../../src/files/guest.js';
import { decodeName, encodeName, normalPath, script, showName } from '../../../src/files/names.js';
import { findPlace, splitVolumePath } from '../../../src/files/places.js';
import { parseTarMessages, unescapeName } from '../../../src/files/tar-messages.js';
import type { FoundFileSystem } from '../../../src/files/types.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

describe('names', () => {
  it('every name survives the way to text and back', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 40 }), (bytes) => {
        expect(encodeName(decodeName(bytes)).equals(Buffer.from(bytes))).toBe(true);
      }),
    );
    const hard = Buffer.from([
      0xf0, 0x9f, 0x98, 0x80, 0xff, 0xed, 0xa0, 0x80, 0xc3, 0xef, 0xbf, 0xbd,
    ]);
    expect(encodeName(decodeName(hard)).equals(hard)).toBe(true);
    expect(showName(decodeName(Buffer.from([97, 0xff, 10])))).toBe('a\\xff\\x0a');
  });

  it('is one word of a shell, whatever is in it', () => {
    for (const name of [
      "it's",
      '$(reboot)',
      'a\nb',
      ' ',
      '`x`',
      '\\',
      decodeName(Buffer.of(0xff, 39)),
    ]) {
      const out = execFileSync('/bin/sh', ['-s'], { input: script`printf %s ${name}` });
      expect(out.equals(encodeName(name))).toBe(true);
    }
  });

  it('makes paths absolute, and not above the root', () => {
    expect(normalPath('etc//x/./y/')).toBe('/etc/x/y');
    expect(normalPath('../../a/../b')).toBe('/b');
    expect(normalPath('')).toBe('/');
  });
});

const fs = (name: string, more: Partial<FoundFileSystem> = {}): FoundFileSystem => ({
  name,
  type: 'ext4',
  offsetBytes: 0,
  sizeBytes: 1,
  ...more,
});

describe('places', () => {
  const two = [fs('p1', { label: 'boot' }), fs('p2', { label: 'root', uuid: 'abc' }), fs('vg/lv')];

  it('one file system needs no name', () => {
    expect(findPlace([fs('p1')], 'etc/x')?.path).toBe('/etc/x');
    expect(findPlace([fs('p1')], '/p1/x')?.path).toBe('/p1/x');
    expect(findPlace([fs('p1')], '')?.path).toBe('/');
    expect(findPlace([fs('p1')], 'p1:/x')?.path).toBe('/x');
    expect(findPlace([fs('p1')], 'a:b')?.path).toBe('/a:b');
  });

  it('of several, the first part or what is before a colon names one', () => {
    expect(findPlace(two, '/p2/etc')).toMatchObject({ path: '/etc', fileSystem: { name: 'p2' } });
    expect(findPlace(two, 'p2')).toMatchObject({ path: '/', fileSystem: { name: 'p2' } });
    expect(findPlace(two, 'root:/etc')).toMatchObject({ fileSystem: { name: 'p2' } });
    expect(findPlace(two, 'abc:etc')).toMatchObject({ path: '/etc', fileSystem: { name: 'p2' } });
    expect(findPlace(two, 'vg/lv/etc')).toMatchObject({
      path: '/etc',
      fileSystem: { name: 'vg/lv' },
    });
    expect(findPlace(two, 'vg/lv:/etc')).toMatchObject({ path: '/etc' });
    expect(findPlace(two, '/')).toBeUndefined();
    expect(() => findPlace(two, '/p3/etc')).toThrow(/no file system/);
    expect(() => findPlace(two, 'vg/lv2/etc')).toThrow(/no file system/);
    expect(() => findPlace([...two, fs('p3', { label: 'root' })], 'root:/')).toThrow(
      /2 file systems/,
    );
  });

  it('splits volume and path', () => {
    expect(splitVolumePath('web/sda:/etc:x')).toEqual({ volume: 'web/sda', path: '/etc:x' });
    expect(splitVolumePath('web/sda')).toEqual({ volume: 'web/sda' });
    expect(splitVolumePath('a:b:/x', ['a:b'])).toEqual({ volume: 'a:b', path: '/x' });
    expect(splitVolumePath('a:b', ['a:b'])).toEqual({ volume: 'a:b' });
  });
});

describe('find', () => {
  const text =
    'f 644 2 1 2 7 8 1700000000.1234567890 -1.5000000000 12 ./a\nb\0\0' +
    'l 777 1 0 0 4 0 0.0000000000 0.0000000000 13 ./l\0a\nb \0';

  it('is parsed wherever it is cut', () => {
    const bytes = Buffer.from(text);
    for (let cut = 0; cut <= bytes.length; cut++) {
      const parser = new FindParser();
      const all = [...parser.take(bytes.subarray(0, cut)), ...parser.take(bytes.subarray(cut))];
      parser.end();
      expect(all).toMatchObject([
        {
          path: '/a\nb',
          kind: 'file',
          permissions: 0o644,
          mtimeNs: 1_700_000_000_123_456_789n,
          ctimeNs: -500_000_000n,
          allocatedBytes: 4096,
          inode: 12n,
        },
        { path: '/l', kind: 'symlink', target: 'a\nb ' },
      ]);
    }
  });

  it('a list that breaks off is an error', () => {
    const parser = new FindParser();
    parser.take(Buffer.from(text.slice(0, 60)));
    expect(() => parser.end()).toThrow(/broke off/);
    expect(() => new FindParser().take(Buffer.from('nonsense\0\0'))).toThrow(/unexpected/);
  });
});

describe('tar', () => {
  it('tells damage from notes and from failure', () => {
    const found = parseTarMessages(
      [
        'tar: ./a\\nb: Read error at byte 4096, while reading 512 bytes: Input/output error',
        '/t/tar: ./c: Cannot open: Input/output error',
        'tar: ./d: File shrank by 5 bytes; padding with zeros',
        'tar: ./s: socket ignored',
        'tar: Exiting with failure status due to previous errors',
      ].join('\n'),
    );
    expect(found.damaged.map((d) => d.name)).toEqual(['./a\\nb', './c', './d']);
    expect(found.notes).toEqual(['./s: socket ignored']);
    expect(found.fatal).toEqual([]);
    expect(parseTarMessages('tar: memory exhausted').fatal).toEqual(['memory exhausted']);
  });

  it('names are unquoted', () => {
    expect(unescapeName('a\\nb\\\\c\\303\\244ä').toString()).toBe('a\nb\\cää');
    expect([...unescapeName('\\377')]).toEqual([255]);
  });
});

describe('frames of the tiny VM', () => {
  it('are parsed wherever they are cut', () => {
    const bytes = Buffer.from('R\nD5\nhel\noX0 0\nD1\nzX2 3\nerrR\n');
    for (let cut = 0; cut <= bytes.length; cut++) {
      const parser = new FrameParser();
      const frames = [...parser.take(bytes.subarray(0, cut)), ...parser.take(bytes.subarray(cut))];
      const data = (list: readonly Frame[]): string =>
        list.map((f) => (f.type === 'data' ? f.bytes.toString() : `<${f.type}>`)).join('');
      expect(data(frames)).toBe('<ready>hel\no<end>z<end><ready>');
      expect(frames.filter((f) => f.type === 'end')).toEqual([
        { type: 'end', status: 0, stderr: '' },
        { type: 'end', status: 2, stderr: 'err' },
      ]);
    }
  });

  it('nonsense is refused', () => {
    expect(() => new FrameParser().take(Buffer.from('D99999999\n'))).toThrow(/senseless/);
    expect(() => new FrameParser().take(Buffer.alloc(100, 65))).toThrow(/senseless/);
  });
});

describe('the guest', () => {
  it('loads modules after what they need', () => {
    const tree = new ModuleTree(
      '/m',
      'kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/jbd2.ko\nkernel/lib/crc16.ko:\nkernel/fs/jbd2.ko:\nkernel/a/dm-mod.ko.xz:\n',
      'kernel/fs/xfs/xfs.ko\n',
    );
    expect(tree.ofDriver('ext4')).toEqual([
      '/m/kernel/fs/jbd2.ko',
      '/m/kernel/lib/crc16.ko',
      '/m/kernel/fs/ext4/ext4.ko',
    ]);
    expect(tree.order(['dm_mod', 'none'])).toEqual(['/m/kernel/a/dm-mod.ko.xz']);
    expect([tree.has('ext4'), tree.has('xfs'), tree.has('ntfs3')]).toEqual([true, true, false]);
  });

  it('finds the libraries that ldd names', () => {
    expect(
      parseLdd(
        '\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\t/lib64/ld-linux.so.2 (0x7f)\n',
      ),
    ).toEqual(['/lib/libc.so.6', '/lib64/ld-linux.so.2']);
  });

  requires({ tools: ['busybox'] }).it('archives that cpio unpacks', async () => {
    await using dir = tempDir();
    const archive = cpioArchive([
      { path: 'd', mode: 0o040755, data: new Uint8Array(0) },
      { path: 'd/file', mode: 0o100640, data: Buffer.from('content') },
      { path: 'd/odd', mode: 0o100600, data: Buffer.from('abcde') },
    ]);
    mkdirSync(dir.join('out'));
    execFileSync('busybox', ['cpio', '-id'], {
      cwd: dir.join('out'),
      input: archive,
      stdio: 'pipe',
    });
    expect(readFileSync(dir.join('out/d/file'), 'utf8')).toBe('content');
    expect(readFileSync(dir.join('out/d/odd'), 'utf8')).toBe('abcde');
    expect(statSync(dir.join('out/d/file')).mode & 0o777).toBe(0o640);
  });
});

it('extents come from filefrag, without what lies nowhere', () => {
  const text = `Filesystem type is: ef53
File size of x is 1000000 (1954 blocks of 512 bytes)
 ext:     logical_offset:        physical_offset: length:   expected: flags:
   0:        0..     255:      34816..     35071:    256:
   1:      256..     511:      99999..    100254:    256:      35072: unwritten
   2:      512..    1953:      40000..     41441:   1442:     100255: last,eof
x: 3 extents found
`;
  expect(parseExtents(text, 1_048_576)).toEqual([
    { offset: 0, length: 131_072, imageOffset: 1_048_576 + 34_816 * 512 },
    { offset: 262_144, length: 1442 * 512, imageOffset: 1_048_576 + 40_000 * 512 },
  ]);
});

describe('notes of a mount', () => {
  it('are told, and nothing else of what the tools said', () => {
    const told: unknown[] = [];
    tellNotes(
      'mount: warning\nb2-note: the log could not be replayed\nx b2-note: no\n',
      'p2',
      (e) => told.push(e),
    );
    expect(told).toEqual([{ type: 'warning', message: 'p2: the log could not be replayed' }]);
  });
});
