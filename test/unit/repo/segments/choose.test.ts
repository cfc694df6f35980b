import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { SegmentName } from '../../../../src/format/names.js';
import { chooseSegments } from '../../../../src/repo/segments/choose.js';

const seg = (level: number | undefined, firstSeq: number, lastSeq: number): SegmentName => ({
  volumeId: '11'.repeat(16),
  level,
  firstSeq,
  lastSeq,
});

describe('chooseSegments', () => {
  it('takes the longer where a crash left both', () => {
    const merged = seg(1, 1, 32);
    const parts = [seg(0, 1, 16), seg(0, 17, 32)];
    const next = seg(0, 33, 40);
    const chosen = chooseSegments([parts[1] ?? next, next, merged, parts[0] ?? next]);
    expect(chosen.chain.map((l) => l.segment)).toEqual([merged, next]);
    expect(chosen.covered).toEqual(parts);
  });

  it('takes the higher level of two with the same range', () => {
    const chosen = chooseSegments([seg(0, 1, 5), seg(2, 1, 5), seg(1, 1, 5)]);
    expect(chosen.chain.map((l) => l.segment.level)).toEqual([2]);
    expect(chosen.covered).toHaveLength(2);
  });

  it('sorts full maps by the point they hold', () => {
    const chosen = chooseSegments([seg(undefined, 1, 9), seg(0, 1, 9), seg(undefined, 1, 4)]);
    expect(chosen.fullMaps.map((s) => s.lastSeq)).toEqual([4, 9]);
  });

  it('covers what the segments cover, once, whatever they are', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.record({ level: fc.nat(3), firstSeq: fc.integer({ min: 1, max: 30 }), n: fc.nat(12) }),
          {
            maxLength: 12,
          },
        ),
        (list) => {
          const segments = list.map((s) => seg(s.level, s.firstSeq, s.firstSeq + s.n));
          const { chain, covered } = chooseSegments(segments);
          const wanted = new Set(segments.flatMap((s) => range(s.firstSeq, s.lastSeq)));
          const got = chain.flatMap((l) => range(l.afterSeq + 1, l.uptoSeq));
          expect(got).toEqual([...wanted].sort((a, b) => a - b));
          for (const l of chain) {
            expect(l.segment.firstSeq).toBeLessThanOrEqual(l.afterSeq + 1);
            expect(l.segment.lastSeq).toBe(l.uptoSeq);
          }
          const kept = new Set(chain.flatMap((l) => range(l.segment.firstSeq, l.segment.lastSeq)));
          for (const c of covered)
            for (const s of range(c.firstSeq, c.lastSeq)) expect(kept.has(s)).toBe(true);
        },
      ),
    );
  });
});

function range(first: number, last: number): number[] {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}
