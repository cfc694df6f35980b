/**
 * The fault sweep: each step of the scenario (test/support/scenario.ts) runs with a fault at each of its store calls in turn.
 * Then: what failed says so with a B2Error that names the object; everything acknowledged restores bit for bit; when the fault is
 * gone, the same open repository does the step after all; and the history is whole. (Vitest itself fails the run on an unhandled rejection.)
 */
import { describe, expect, it } from 'vitest';
import { B2Error } from '../../../src/errors.js';
import {
  FIRST,
  SECOND,
  World,
  checkAll,
  playSteps,
  type Checkpoint,
  type Step,
} from '../../support/scenario.js';
import {
  FaultStore,
  type CallKind,
  type Fault,
  type FaultRule,
} from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

/** What happens at one call. */
type Trouble =
  /** No space from this call on, until somebody makes room. */
  | 'full'
  /** Every call from this one on fails with an I/O error: the disk is gone until it is plugged in again. */
  | 'gone'
  | Fault;

/** Of the pairs of call and trouble every so many is tried; 1 (B2_TEST_STRIDE=1) tries all, which takes minutes. */
const STRIDE = Number(process.env['B2_TEST_STRIDE'] ?? 3);

const IO: Fault = { do: 'io', retryable: false };
const IO_RETRYABLE: Fault = { do: 'io', retryable: true };
const LOST: Fault = { do: 'lose-answer' };
const PARTIAL: Fault = { do: 'partial' };
const SHORT: Fault = { do: 'short' };
const FLIP: Fault = { do: 'flip' };

const TROUBLES: Record<CallKind, readonly Trouble[]> = {
  put: ['full', 'gone', IO, IO_RETRYABLE, LOST, PARTIAL],
  openAppend: ['full', 'gone', IO, LOST],
  append: ['full', 'gone', IO, IO_RETRYABLE, LOST, PARTIAL],
  sync: ['full', 'gone', IO, LOST],
  delete: ['gone', IO, IO_RETRYABLE, LOST],
  get: ['gone', IO, SHORT, FLIP],
  read: ['gone', IO, SHORT, FLIP],
  open: ['gone', IO],
  list: ['gone', IO],
  stat: ['gone', IO],
};

const nameOf = (t: Trouble): string =>
  typeof t === 'string' ? t : `${t.do}${t.do === 'io' && t.retryable ? ' (retryable)' : ''}`;

/** The kinds of a step's calls in order, from a run without faults. */
async function callsOf(
  step: Step,
  from: Checkpoint | undefined,
  canAppend: boolean,
  encrypted: boolean,
  seed: number,
): Promise<CallKind[]> {
  const kinds: CallKind[] = [];
  const note: FaultRule = ({ kind }) => {
    kinds.push(kind);
    return undefined;
  };
  const base = from?.store.clone() ?? new MemoryStore({ canAppend, record: false });
  await step.run(await World.start(new FaultStore(base, note), from, encrypted, seed));
  return kinds;
}

/** An error and its causes, in a line. */
function told(error: unknown): string {
  const parts: string[] = [];
  for (let e = error; e instanceof Error; e = e.cause) parts.push(`${e.name}: ${e.message}`);
  return parts.join(' <- ');
}

/** Lets time pass while `work` waits for nothing else: whoever watches a lease of unknown state waits for it to lapse. */
async function driven(work: Promise<void>, world: World): Promise<void> {
  let done = false;
  const end = (): void => void (done = true);
  work.then(end, end);
  for (let turns = 0; !done; turns++) {
    await new Promise((resolve) => setImmediate(resolve));
    if (turns % 500 === 499) await world.env.clock.advanceMs(1000);
    if (turns > 1_000_000) throw new Error('it hangs');
  }
  await work;
}

interface Tally {
  cases: number;
  rejected: number;
  /** States of a store that {@link checkAll} was content with, and what it was asked for. */
  readonly right: Set<string>;
  readonly kinds: Map<string, number>;
}

async function oneCase(
  step: Step,
  from: Checkpoint | undefined,
  options: { canAppend: boolean; encrypted: boolean; seed: number; n: number; trouble: Trouble },
  tally: Tally,
): Promise<void> {
  const { canAppend, encrypted, seed, n, trouble } = options;
  const base = from?.store.clone() ?? new MemoryStore({ canAppend, record: false });
  const store = new FaultStore(base);
  let hit = '';
  store.setFaults((call) => {
    if (call.total === n) hit = call.name;
    if (trouble === 'gone') return call.total >= n ? IO : undefined;
    if (trouble === 'full') {
      if (call.total === n) store.fillUp();
      return undefined;
    }
    return call.total === n ? trouble : undefined;
  });
  const world = await World.start(store, from, encrypted, seed);
  const secrets = encrypted ? [FIRST, SECOND] : [];
  let failure: unknown;
  try {
    await driven(step.run(world), world);
  } catch (error) {
    failure = error;
  }
  if (failure !== undefined) {
    tally.rejected++;
    if (!(failure instanceof B2Error)) throw new Error('not a B2Error', { cause: failure });
    tally.kinds.set(failure.kind, (tally.kinds.get(failure.kind) ?? 0) + 1);
    const expected: readonly string[] =
      trouble === 'full' || nameOf(trouble) === 'partial'
        ? ['no-space']
        : nameOf(trouble) === 'flip' || nameOf(trouble) === 'short'
          ? ['damaged', 'refused', 'wrong-key', 'held']
          : ['io'];
    if (!expected.includes(failure.kind))
      throw new Error(`${failure.kind} is not what it was`, { cause: failure });
    // The object is named: by its name, or by the id that is its last part.
    const last = hit.split('/').at(-1) ?? '';
    if (trouble !== 'gone' && trouble !== 'full' && !failure.message.includes(last)) {
      throw new Error(`the message does not name ${hit}: ${failure.message}`, { cause: failure });
    }
  }
  store.setFaults();
  store.makeRoom();
  if (from !== undefined) {
    // Many faults leave the same bytes: they are looked at once.
    const { acknowledged } = world.model;
    const state = `${base.digest()} ${acknowledged.map((e) => `${e.seq} ${e.sizeBytes} ${e.digest}`).join()}`;
    if (!tally.right.has(state)) await checkAll(base.clone(), acknowledged, secrets);
    tally.right.add(state);
  }
  // The same open repository, the same device: now it works.
  if (failure !== undefined) await driven(step.run(world), world);
  await world.session((writer) => world.capture(writer));
  await checkAll(base, world.model.acknowledged, secrets);
  tally.cases++;
}

describe.each([
  { canAppend: true, encrypted: false, seed: 101 },
  { canAppend: false, encrypted: true, seed: 202 },
])(
  'a fault at every call (append $canAppend, encrypted $encrypted)',
  ({ canAppend, encrypted, seed }) => {
    it(
      'is told clearly, loses nothing, and is over when it is over',
      { timeout: 600_000 },
      async () => {
        const { steps, before } = await playSteps({ canAppend, encrypted }, seed);
        const tally: Tally = { cases: 0, rejected: 0, right: new Set(), kinds: new Map() };
        const perStep: string[] = [];
        const failures: string[] = [];
        for (const [i, step] of steps.entries()) {
          if (step.name.endsWith('short sessions')) continue; // there to give the merge something to merge
          const from = before[i];
          const kinds = await callsOf(step, from, canAppend, encrypted, seed + i);
          expect(kinds.length).toBeGreaterThan(2);
          perStep.push(`${step.name} ${kinds.length}`);
          for (const [n, kind] of kinds.entries()) {
            for (const [t, trouble] of TROUBLES[kind].entries()) {
              if ((n + t) % STRIDE !== 0) continue;
              try {
                await oneCase(
                  step,
                  from,
                  { canAppend, encrypted, seed: seed + i, n, trouble },
                  tally,
                );
              } catch (error) {
                const line = `step "${step.name}", call ${n} of ${kinds.length} (${kind}), ${nameOf(trouble)}, seed ${seed}: ${told(error)}`;
                failures.push(line);
                console.log(line);
              }
            }
          }
        }
        const kinds = [...tally.kinds].map(([kind, count]) => `${count} ${kind}`).join(', ');
        console.log(
          `fault sweep (append ${canAppend}, encrypted ${encrypted}): ${tally.cases} faults (${tally.right.size} different states after them), ${tally.rejected} of them failed the operation (${kinds}); calls of the steps: ${perStep.join(', ')}; seed ${seed}`,
        );
        expect(failures.slice(0, 40), `${failures.length} cases failed`).toEqual([]);
        expect(tally.rejected).toBeGreaterThan(tally.cases / 4);
      },
    );
  },
);
