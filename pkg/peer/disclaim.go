package peer

import (
	"context"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Disclaim tells the peer that is in doubt about an instance which it gave away to here that the instance never ran here and never will: the
// process that was to receive it died too early. The other peer then lets it run again. It is looked for by Config.FindSource, within
// Config.RescueTimeout. Only the migration that the devices of cfg have on record is disclaimed; where they have none, the error wraps
// runner.ErrNotVoid.
func Disclaim(ctx context.Context, cfg Config) (migration string, err error) {
	cfg = cfg.withDefaults()
	v, err := runner.OpenVoid(cfg.runner())
	if err != nil {
		return "", err
	}
	defer v.Close()
	migration = wire.PublicID(v.Migration())
	return migration, migrate.Disclaim(ctx, migrate.DestinationConfig{
		Journal: voidJournal{v}, Reconnect: cfg.FindSource, Admit: cfg.Authorize.again(false, func() string { return v.Migration() }), RescueTimeout: cfg.RescueTimeout, Logger: cfg.Logger,
	}, v.Migration())
}

// CheckVacant reports, as an error that says what can be done, that the devices of cfg hold an instance already, so that Receive
// would refuse any other. It changes nothing.
func CheckVacant(cfg Config) error { return runner.CheckVacant(cfg.withDefaults().runner()) }

// Void reports whether the devices of cfg hold what an unfinished migration has left: see [Disclaim].
func Void(cfg Config) bool {
	v, err := runner.OpenVoid(cfg.withDefaults().runner())
	if err != nil {
		return false
	}
	v.Close() // nothing was written
	return true
}

// voidJournal is the journal of a migration that will not happen.
type voidJournal struct{ *runner.Void }

func (j voidJournal) Abort(ctx context.Context, id string) error { return j.Refuse(ctx, id) }
func (voidJournal) Commit(context.Context, string) error         { return runner.ErrPhase }
func (voidJournal) Done(context.Context, string) error           { return nil }
