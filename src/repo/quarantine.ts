/** Frames that repair has set aside as damaged (FORMAT.md section 4, kind 7). */
import { B2Error, isKind } from '../errors.js';
import { quarantineName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import type { Repository } from './repository.js';

export interface QuarantinedFrame {
  readonly number: number;
  /** Where it starts in the pack; −1 where that was not known. */
  readonly offset: number;
  readonly reason: string;
}

/** One quarantine object: frames of one pack. */
export interface Quarantine {
  /** Of the object. */
  readonly name: string;
  readonly createdNs: bigint;
  readonly packId: string;
  readonly frames: readonly QuarantinedFrame[];
}

/** Puts a new quarantine object; returns its name. */
export async function putQuarantine(
  repo: Repository,
  packId: string,
  frames: readonly QuarantinedFrame[],
): Promise<string> {
  const name = quarantineName(repo.newId());
  await repo.putObject(ObjectKind.quarantine, name, {
    created: repo.env.clock.nowNs(),
    pack: packId,
    frames: frames.map((f) => ({
      number: f.number,
      offset: String(Math.max(0, f.offset)),
      reason: f.reason,
    })),
  });
  return name;
}

/** Kinds `not-found`, `damaged`. */
export async function readQuarantine(repo: Repository, name: string): Promise<Quarantine> {
  const o = await repo.getObject(ObjectKind.quarantine, name);
  const { created, pack, frames } = o;
  const bad = (): B2Error =>
    new B2Error('damaged', `${name}: its payload is not that of a quarantine object`);
  if (typeof created !== 'string' || !/^\d{1,20}$/.test(created)) throw bad();
  if (typeof pack !== 'string' || !/^[0-9a-f]{32}$/.test(pack) || !Array.isArray(frames))
    throw bad();
  const list = frames.map((f: unknown): QuarantinedFrame => {
    if (typeof f !== 'object' || f === null) throw bad();
    const { number, offset, reason } = f as Record<string, unknown>;
    if (typeof number !== 'number' || !Number.isSafeInteger(number) || number < 0) throw bad();
    return {
      number,
      offset: typeof offset === 'string' && /^\d{1,16}$/.test(offset) ? Number(offset) : -1,
      reason: typeof reason === 'string' ? reason : '',
    };
  });
  return { name, createdNs: BigInt(created), packId: pack, frames: list };
}

/**
 * All quarantine objects that can be read; `warn` hears of the others. What they name must not be reused by dedupe.
 */
export async function listQuarantine(
  repo: Repository,
  warn: (message: string) => void = () => undefined,
): Promise<Quarantine[]> {
  const list: Quarantine[] = [];
  for await (const { name } of repo.store.list('quarantine')) {
    try {
      list.push(await readQuarantine(repo, name));
    } catch (error) {
      if (isKind(error, 'not-found')) continue;
      if (!isKind(error, 'damaged')) throw error;
      warn(error.message);
    }
  }
  return list.sort((a, b) => (a.name < b.name ? -1 : 1));
}
