import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  DirectoryReply,
  Errno,
  MAX_READ_BYTES,
  Opcode,
  initReply,
  parseHeader,
  parseRequest,
  type Request,
} from '../../../src/mount/protocol.js';
import type { OpenFile, TreeDirectory, TreeFile } from '../../../src/mount/tree.js';
import { TestKernel, request } from './kernel.js';

function parse(bytes: Buffer): Request {
  const header = parseHeader(bytes);
  if (header === undefined) throw new Error('no header');
  return parseRequest(header, bytes);
}

const CONTENT = Buffer.from(Array.from({ length: 10_000 }, (_, i) => i % 251));

function smallTree(opened: { count: number } = { count: 0 }): TreeDirectory {
  const file: TreeFile = {
    kind: 'file',
    key: 'file',
    mtimeNs: 5n,
    sizeBytes: CONTENT.length,
    allocatedBytes: () => Promise.resolve(CONTENT.length),
    open: () => {
      opened.count++;
      const open: OpenFile = {
        sizeBytes: CONTENT.length,
        read: (into, offset) => {
          into.set(CONTENT.subarray(offset, offset + into.byteLength));
          return Promise.resolve();
        },
        seek: (offset, what) => Promise.resolve(what === 'data' ? offset : CONTENT.length),
        close: () => {
          opened.count--;
          return Promise.resolve();
        },
      };
      return Promise.resolve(open);
    },
  };
  const root: TreeDirectory = {
    kind: 'directory',
    key: 'root',
    mtimeNs: 1n,
    lookup: (name) =>
      Promise.resolve(
        name === 'file'
          ? { node: file, isVolatile: false }
          : name === 'dir'
            ? { node: { ...root, key: 'dir' }, isVolatile: false }
            : undefined,
      ),
    list: async function* () {
      yield { name: 'file', kind: 'file' };
      yield {
        name: 'dir',
        kind: 'directory',
        entry: { node: { ...root, key: 'dir' }, isVolatile: false },
      };
      for (let i = 0; i < 500; i++) yield { name: `name-${i}`, kind: 'file' };
    },
  };
  return root;
}

describe('requests', () => {
  it('are refused with EINVAL where they are shorter than their fields', () => {
    for (const [opcode, least] of [
      [Opcode.read, 40],
      [Opcode.init, 16],
      [Opcode.lseek, 24],
      [Opcode.open, 8],
      [Opcode.release, 24],
      [Opcode.batchForget, 8],
    ] as const) {
      for (let n = 0; n < least; n++) {
        expect(parse(request(opcode, 1, 1n, Buffer.alloc(n)))).toEqual({
          op: 'refused',
          errno: Errno.EINVAL,
        });
      }
      expect(parse(request(opcode, 1, 1n, Buffer.alloc(least))).op).not.toBe('refused');
    }
  });

  it('are none where the length in them is another', () => {
    const bytes = request(Opcode.lookup, 1, 1n, Buffer.from('a\0'));
    bytes.writeUInt32LE(bytes.length + 1, 0);
    expect(parseHeader(bytes)).toBeUndefined();
    expect(parseHeader(Buffer.alloc(39))).toBeUndefined();
  });

  it('that would change something answer EROFS, unknown ones ENOSYS', () => {
    for (const opcode of [
      Opcode.write,
      Opcode.unlink,
      Opcode.create,
      Opcode.setattr,
      Opcode.rename2,
      Opcode.fallocate,
    ]) {
      expect(parse(request(opcode, 1, 1n, Buffer.alloc(100)))).toEqual({
        op: 'refused',
        errno: Errno.EROFS,
      });
    }
    for (const opcode of [0, 25, 52, 4096, 4_294_967_295]) {
      expect(parse(request(opcode, 1, 1n, Buffer.alloc(100)))).toEqual({
        op: 'refused',
        errno: Errno.ENOSYS,
      });
    }
  });

  it('for extended attributes carry a name and room', () => {
    const body = Buffer.concat([Buffer.alloc(8), Buffer.from('user.x\0')]);
    body.writeUInt32LE(77, 0);
    expect(parse(request(Opcode.getxattr, 1, 1n, body))).toEqual({
      op: 'getxattr',
      name: Buffer.from('user.x'),
      size: 77,
    });
    expect(parse(request(Opcode.listxattr, 1, 1n, body.subarray(0, 8)))).toEqual({
      op: 'listxattr',
      size: 77,
    });
    // A name without its end.
    expect(parse(request(Opcode.getxattr, 1, 1n, body.subarray(0, 14)))).toMatchObject({
      op: 'refused',
    });
  });

  it('a read of more than was agreed on is refused', () => {
    expect(parse(request(Opcode.read, 1, 1n, TestKernel.readBody(1, 0, MAX_READ_BYTES))).op).toBe(
      'read',
    );
    expect(
      parse(request(Opcode.read, 1, 1n, TestKernel.readBody(1, 0, MAX_READ_BYTES + 1))).op,
    ).toBe('refused');
  });

  it('a batch of forgets that claims more than it holds is cut', () => {
    const body = Buffer.alloc(8 + 32);
    body.writeUInt32LE(4_000_000_000, 0);
    body.writeBigUInt64LE(7n, 8);
    body.writeBigUInt64LE(1n, 16);
    expect(parse(request(Opcode.batchForget, 0, 1n, body))).toEqual({
      op: 'forget',
      items: [
        { node: 7, count: 1 },
        { node: 0, count: 0 },
      ],
    });
  });
});

describe('INIT', () => {
  const init = {
    op: 'init',
    major: 7,
    minor: 38,
    maxReadahead: 131_072,
    flags: 0xffff_ffff,
  } as const;

  it('takes only what we can do, and big reads', () => {
    const reply = initReply(init);
    expect(reply?.readUInt32LE(4)).toBe(31);
    expect((reply?.readUInt32LE(12) ?? 0) & (1 << 22)).not.toBe(0); // max_pages
    expect((reply?.readUInt32LE(12) ?? 0) & ((1 << 16) | (1 << 17) | (1 << 30))).toBe(0); // writeback, no_open, init_ext
    expect(reply?.readUInt16LE(28)).toBe(256);
  });

  it('refuses what is older than 7.23, and answers a newer major with ours', () => {
    expect(initReply({ ...init, minor: 22 })).toBeUndefined();
    expect(initReply({ ...init, major: 6 })).toBeUndefined();
    expect(initReply({ ...init, major: 8 })?.readUInt32LE(0)).toBe(7);
  });
});

describe('a session', () => {
  it('answers every hostile request once and stays alive', async () => {
    const opened = { count: 0 };
    const kernel = new TestKernel(smallTree(opened));
    let unique = 1_000_000n;
    const opcodes = [...Object.values(Opcode), 0, 7, 99, 0xffff_ffff];
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...opcodes),
        fc.oneof(fc.nat(6), fc.constantFrom(1, 2, 3, Number.MAX_SAFE_INTEGER)),
        fc.oneof(
          fc.uint8Array({ maxLength: 200 }),
          fc
            .tuple(fc.nat(6), fc.bigInt(0n, (1n << 64n) - 1n), fc.nat(0xffff_ffff))
            .map(([h, o, l]) => TestKernel.readBody(h, o, l)),
          fc
            .constantFrom('file\0', 'dir\0', '\0', 'file', `${'x'.repeat(400)}\0`)
            .map((s) => Buffer.from(s)),
        ),
        async (opcode, node, body) => {
          await kernel.session.handle(request(opcode, node, ++unique, body));
          const isSilent =
            opcode === Opcode.forget ||
            opcode === Opcode.batchForget ||
            opcode === Opcode.interrupt;
          const isShort = body.byteLength < 8;
          if (!isSilent) expect(kernel.replies.has(unique)).toBe(true);
          else if (!isShort) expect(kernel.replies.has(unique)).toBe(false);
        },
      ),
      { numRuns: 5000 },
    );
    await kernel.session.handle(Buffer.from('not a request at all'));
    expect(kernel.broken).toEqual([]);
    expect(kernel.session.held.readBytes).toBe(0);
    // Still what it was for who behaves.
    const { node, sizeBytes } = await kernel.walk('file');
    expect(sizeBytes).toBe(CONTENT.length);
    const handle = await kernel.open(node);
    expect((await kernel.read(handle, 100, 50)).payload).toEqual(CONTENT.subarray(100, 150));
    expect((await kernel.read(handle, 9_990, 4096)).payload).toEqual(CONTENT.subarray(9_990));
    expect((await kernel.read(handle, CONTENT.length, 4096)).payload.length).toBe(0);
    expect((await kernel.read(handle, (1n << 64n) - 1n, 4096)).payload.length).toBe(0);
    await kernel.session.close();
    expect(opened.count).toBe(0);
  });

  it('lists a directory in pieces of any size, from any offset, with and without attributes', async () => {
    const kernel = new TestKernel(smallTree());
    const expected = ['file', 'dir', ...Array.from({ length: 500 }, (_, i) => `name-${i}`)];
    for (const limit of [200, 512, 4096, 65_536]) {
      expect(await kernel.names(1, limit)).toEqual(expected);
    }
    const plus = await kernel.list(1, 4096, true);
    expect(plus.map((l) => l.name)).toEqual(expected);
    expect(plus.filter((l) => l.node !== 0).map((l) => l.name)).toEqual(['dir']);
    const handle = await kernel.open(1, true);
    for (const offset of [300, 5, 0, 502, 2, 504]) {
      const [first] = await kernel.readDirectory(handle, offset, 100);
      expect(first?.name).toBe(['.', '..', ...expected][offset]);
    }
  });

  it('forgets nodes as the kernel does, and what it could not tell of', async () => {
    let takes = true;
    const kernel = new TestKernel(smallTree(), undefined, () => takes);
    const { node } = await kernel.walk('file');
    await kernel.walk('file');
    await kernel.walk('dir', 'file');
    expect(kernel.session.held.nodes).toBe(3); // root, file (one for all its names), dir
    const forget = async (count: number): Promise<void> => {
      const body = Buffer.alloc(8);
      body.writeBigUInt64LE(BigInt(count), 0);
      await kernel.session.handle(request(Opcode.forget, node, 0n, body));
    };
    await forget(2);
    expect(kernel.session.held.nodes).toBe(3);
    await forget(1);
    expect(kernel.session.held.nodes).toBe(2);
    expect((await kernel.ask(Opcode.getattr, node, Buffer.alloc(16))).errno).toBe(Errno.ESTALE);
    takes = false;
    await kernel.session.handle(request(Opcode.lookup, 1, 900n, Buffer.from('file\0')));
    const directory = await kernel.session.handle(
      request(Opcode.opendir, 1, 901n, Buffer.alloc(8)),
    );
    expect(directory).toBeUndefined();
    expect(kernel.session.held).toMatchObject({ nodes: 2, directories: 0 });
  });

  it('keeps reads under way within a bound, and answers all of them', async () => {
    const waiting: (() => void)[] = [];
    let most = 0;
    const big = 1024 * 1024 * 1024;
    const root = smallTree();
    const file: TreeFile = {
      kind: 'file',
      key: 'big',
      mtimeNs: 0n,
      sizeBytes: big,
      allocatedBytes: () => Promise.resolve(0),
      open: () =>
        Promise.resolve({
          sizeBytes: big,
          read: () => new Promise<void>((resolve) => waiting.push(resolve)),
          seek: () => Promise.resolve(undefined),
          close: () => Promise.resolve(),
        }),
    };
    const kernel = new TestKernel({
      ...root,
      lookup: () => Promise.resolve({ node: file, isVolatile: false }),
    });
    const handle = await kernel.open((await kernel.walk('big')).node);
    const reads = Array.from({ length: 300 }, (_, i) =>
      kernel.read(handle, i * MAX_READ_BYTES, MAX_READ_BYTES),
    );
    let answered = 0;
    for (const r of reads) void r.then(() => answered++);
    while (answered < reads.length) {
      most = Math.max(most, kernel.session.held.readBytes);
      expect(waiting.length).toBeLessThanOrEqual(64);
      waiting.shift()?.();
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(most).toBe(64 * MAX_READ_BYTES);
    expect(kernel.session.held.readBytes).toBe(0);
  });
});

describe('DirectoryReply', () => {
  it('never becomes longer than it may', () => {
    const reply = new DirectoryReply(100, false);
    let added = 0;
    while (reply.fits(Buffer.from('a name'))) reply.add(Buffer.from('a name'), 'file', 1, ++added);
    expect(added).toBe(3);
    expect(reply.finish().length).toBeLessThanOrEqual(100);
  });
});
