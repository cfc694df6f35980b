/**
 * Reading through a store that fails, cuts off or flips a bit at each of its calls in turn: what is read is right, or the failure is told as
 * what it is. Wrong data never.
 */
import { describe, expect, it } from 'vitest';
import { B2Error } from '../../../src/errors.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import {
  digestOf,
  seeded,
  testEnvironment,
  testMeta,
  type Expected,
} from '../../support/model-volume.js';
import { FIRST, SECOND, VOLUME, World, playSteps } from '../../support/scenario.js';
import { FaultStore, type CallKind, type Fault } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

const SEED = 303;
/** Restored in each case: the first, some of the middle, the last. */
const POINTS = 5;

/** Opens the repository and restores some points; resolves to what they were. */
async function readAll(
  store: FaultStore,
  encrypted: boolean,
  seqs: readonly Expected[],
): Promise<string[]> {
  const repo = await Repository.open(
    store,
    encrypted ? [FIRST, SECOND] : [],
    testEnvironment(seeded(1)),
  );
  const history = await VolumeHistory.open(repo, VOLUME);
  try {
    history.refuseGap();
    const digests: string[] = [];
    for (const e of seqs) {
      const image = await openImage(history, testMeta(VOLUME, e.sizeBytes), e.seq);
      const all = Buffer.alloc(image.sizeBytes, 0xee);
      await image.read(all, 0);
      digests.push(digestOf(all));
    }
    return digests;
  } finally {
    await history.close();
    await repo.packs.close();
  }
}

const IO: Fault = { do: 'io', retryable: false };

function faultsOf(kind: CallKind, random: () => number): readonly Fault[] {
  if (kind !== 'get' && kind !== 'read') return [IO];
  // A bit near the beginning, in the middle and near the end, and one anywhere.
  const flips = [3, undefined, Math.floor(random() * 2 ** 24)].map((bit): Fault =>
    bit === undefined ? { do: 'flip' } : { do: 'flip', bit },
  );
  return [IO, { do: 'short' }, ...flips];
}

describe.each([{ encrypted: false }, { encrypted: true }])(
  'bad reads (encrypted $encrypted)',
  ({ encrypted }) => {
    it('are told, or make no difference', { timeout: 120_000 }, async () => {
      const { before } = await playSteps({ canAppend: true, encrypted }, SEED);
      // A state with an open pack in the journal, and segments before it.
      const from = before.at(-1);
      if (from === undefined) throw new Error('no state');
      const world = await World.start(from.store.clone(), from, encrypted, SEED + 50);
      await world.session((writer) => world.capture(writer), true);
      const base = world.store;
      if (!(base instanceof MemoryStore)) throw new Error('not the store');
      const all = world.model.acknowledged;
      const step = Math.max(1, Math.floor(all.length / (POINTS - 1)));
      const wanted = all.filter((_, i) => i % step === 0 || i === all.length - 1);
      const kinds: CallKind[] = [];
      const noting = new FaultStore(base, ({ kind }) => {
        kinds.push(kind);
        return undefined;
      });
      const right = wanted.map((e) => e.digest);
      expect(await readAll(noting, encrypted, wanted)).toEqual(right);
      const random = seeded(SEED);
      const told = new Map<string, number>();
      let cases = 0;
      let same = 0;
      for (const [n, kind] of kinds.entries()) {
        for (const fault of faultsOf(kind, random)) {
          const store = new FaultStore(base, (call) => (call.total === n ? fault : undefined));
          cases++;
          let digests: string[];
          try {
            digests = await readAll(store, encrypted, wanted);
          } catch (error) {
            if (!(error instanceof B2Error))
              throw new Error(`call ${n} (${kind}), ${fault.do}: not a B2Error`, { cause: error });
            const expected = fault.do === 'io' ? ['io'] : ['damaged', 'not-found'];
            if (!expected.includes(error.kind))
              throw new Error(`call ${n} (${kind}), ${fault.do}: ${error.kind}`, { cause: error });
            told.set(error.kind, (told.get(error.kind) ?? 0) + 1);
            continue;
          }
          same++;
          expect(digests, `call ${n} (${kind}), ${fault.do}`).toEqual(right);
        }
      }
      const kindsTold = [...told].map(([kind, count]) => `${count} ${kind}`).join(', ');
      console.log(
        `bad reads (encrypted ${encrypted}): ${cases} cases over ${kinds.length} calls; told: ${kindsTold}; ${same} made no difference; seed ${SEED}`,
      );
      expect(told.get('damaged')).toBeGreaterThan(0);
      expect(told.get('io')).toBeGreaterThan(0);
    });
  },
);
