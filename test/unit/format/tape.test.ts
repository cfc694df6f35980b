import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  decodeTarComment,
  decodeTarHeader,
  encodeTarComment,
  encodeTarHeader,
  tarPaddedBytes,
} from '../../../src/format/tape-tar.js';
import {
  decodeTapeLabel,
  encodeTapeLabel,
  isTapeLabel,
  labelOfName,
  parseTapeComment,
  partOfPayload,
  partPayload,
  tapeComment,
  tapeOfPayload,
  tapePayload,
  type TapeCartridge,
  type TapeLabel,
} from '../../../src/format/tape.js';

const HEX = 'ab'.repeat(16);
const label: TapeLabel = {
  label: 'OFF-001',
  cartridgeId: HEX,
  setName: 'OFF',
  setId: '12'.repeat(16),
  number: 1,
  repositoryId: '34'.repeat(16),
  host: 'web1',
  created: '2026-11-22T20:00:00.000Z',
  recordBytes: 262_144,
  program: '0.1.0',
};

describe('tar headers', () => {
  it('round trip, and any changed byte of them is found', () => {
    fc.assert(
      fc.property(
        fc.stringMatching(/^[a-z0-9/._-]{1,100}$/),
        fc.nat(2 ** 32),
        fc.nat(2 ** 31),
        fc.nat(511),
        (name, sizeBytes, mtime, at) => {
          const b = encodeTarHeader({ name, sizeBytes, mtime, type: 'file' });
          expect(decodeTarHeader(b, 0)).toEqual({ name, sizeBytes, mtime, type: 'file' });
          b.writeUInt8((b[at] ?? 0) ^ 1, at);
          const after = decodeTarHeader(b, 0);
          // A checksum field may be written in several ways; nothing else may change.
          if (after !== undefined) expect(at >= 148 && at < 156).toBe(true);
        },
      ),
      { numRuns: 200 },
    );
  });

  it('refuse what does not fit', () => {
    const h = { name: 'a', sizeBytes: 0, mtime: 0, type: 'file' } as const;
    expect(() => encodeTarHeader({ ...h, name: 'x'.repeat(101) })).toThrow(RangeError);
    expect(() => encodeTarHeader({ ...h, name: 'a b' })).toThrow(RangeError);
    expect(() => encodeTarHeader({ ...h, sizeBytes: -1 })).toThrow(RangeError);
    expect(decodeTarHeader(Buffer.alloc(512), 0)).toBeUndefined();
    expect(decodeTarHeader(Buffer.alloc(100), 0)).toBeUndefined();
  });

  it('comments of every length round trip through a pax record', () => {
    for (let n = 0; n < 220; n++) {
      const comment = 'c'.repeat(n);
      const b = encodeTarComment(comment, 1);
      expect(b.length % 512).toBe(0);
      const header = decodeTarHeader(b, 0);
      expect(header?.type).toBe('global');
      expect(decodeTarComment(b.subarray(512, 512 + (header?.sizeBytes ?? 0)))).toBe(comment);
    }
    expect(decodeTarComment(Buffer.from('999999 comment=x\n'))).toBeUndefined();
  });

  it('are what tar reads', () => {
    const dir = mkdtempSync(join(tmpdir(), 'b2-tar-'));
    try {
      const data = Buffer.from('hello tape');
      const archive = Buffer.concat([
        encodeTarComment('b2 tape 1', 1),
        encodeTarHeader({ name: 'a/b.txt', sizeBytes: data.length, mtime: 1, type: 'file' }),
        data,
        Buffer.alloc(tarPaddedBytes(data.length) - data.length + 1024),
      ]);
      writeFileSync(join(dir, 'x.tar'), archive);
      execFileSync('tar', ['-C', dir, '-xf', join(dir, 'x.tar')]);
      expect(readFileSync(join(dir, 'a/b.txt'), 'utf8')).toBe('hello tape');
    } finally {
      rmSync(dir, { recursive: true });
    }
  });
});

describe('tape objects', () => {
  it('labels round trip; what is none is damaged, what is newer unsupported', () => {
    expect(decodeTapeLabel(encodeTapeLabel(label), 'x')).toEqual(label);
    for (const bad of ['', '[]', '{}', '{"b2":"repository"}', '{"b2":"tape","version":1}'])
      expect(() => decodeTapeLabel(Buffer.from(bad), 'x')).toThrow(
        expect.objectContaining({ kind: 'damaged' }),
      );
    expect(() => decodeTapeLabel(Buffer.from('{"b2":"tape","version":2}'), 'x')).toThrow(
      expect.objectContaining({ kind: 'unsupported' }),
    );
    expect([isTapeLabel('A_b-9'), isTapeLabel('a.b'), isTapeLabel('')]).toEqual([
      true,
      false,
      false,
    ]);
    expect([labelOfName('tapes/A-1'), labelOfName('tapes/A-1.0.0')]).toEqual(['A-1', undefined]);
  });

  it('comments say which file it is, and nothing else passes for one', () => {
    const id = { cartridgeId: HEX, sessionId: '0'.repeat(32), file: 7, kind: 'data' } as const;
    expect(parseTapeComment(tapeComment(id))).toEqual(id);
    expect(parseTapeComment(tapeComment(id).replace('data', 'tada'))).toBeUndefined();
    expect(parseTapeComment(tapeComment(id).replace('tape 1', 'tape 2'))).toBeUndefined();
  });

  it('cartridges and parts round trip through JSON', () => {
    const cartridge: TapeCartridge = {
      tape: label,
      barcode: 'B2T001L5',
      full: true,
      sessions: [
        {
          id: HEX,
          startedNs: 1n,
          finishedNs: 2n ** 63n,
          firstFile: 1,
          endFile: 4,
          bytes: 2 ** 40,
          last: false,
          points: [
            {
              volumeId: HEX,
              volumeName: 'web1/sda',
              seq: 12,
              hash: 'cd'.repeat(32),
              instantNs: 3n,
              pointClass: 'crash',
              sizeBytes: 2 ** 41,
              packId: HEX,
              needs: ['OFF-000'],
            },
          ],
          packs: 1,
          parts: 1,
          verifiedNs: 0n,
          damagedPacks: [HEX],
        },
      ],
    };
    const json = (o: unknown): Record<string, unknown> =>
      JSON.parse(JSON.stringify(o)) as Record<string, unknown>;
    expect(tapeOfPayload(json(tapePayload(cartridge)), 'x')).toEqual(cartridge);
    const part = {
      packs: [{ packId: HEX, file: 2, record: 99 }],
      places: [
        {
          source: '56'.repeat(16),
          frame: 65_535,
          sub: 4095,
          count: 1,
          bySub: true,
          pack: 0,
          toFrame: 3,
          toSub: 2,
        },
        {
          source: HEX,
          frame: 0,
          sub: 0,
          count: 2 ** 31,
          bySub: false,
          pack: 0,
          toFrame: 0,
          toSub: 0,
        },
      ],
    };
    expect(partOfPayload(json(partPayload(part)), 'x')).toEqual(part);
    expect(() => partOfPayload({ ...partPayload(part), packs: '' }, 'x')).toThrow(
      expect.objectContaining({ kind: 'damaged' }),
    );
  });
});
